"""`python -m launch.plan.calibration`: published throughputs, efficiencies fitted on them, and errors left.

A publication seldom says all that a step's time depends on. What is assumed here stands in each row: weights
divided over all devices, so many sequences on each, and what is kept for the backward pass.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

from core.config import load, parse, to_dict
from core.devices import DEVICES
from core.errors import run_command
from launch.plan.device import find
from launch.plan.layout import Layout
from launch.plan.roofline import times
from llm.config import Experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "llm"


class Row(NamedTuple):
    """A published throughput (tokens a second and device); `rows` and `remat` are our assumptions."""

    system: str
    config: str
    device: str
    devices: int
    length: int
    published: float
    rows: int
    remat: str
    fitted: bool = False  # one row for each family of devices


ROWS = (
    Row("MaxText", "llama2-70b", "h100", 64, 4096, 1036, 4, "full", fitted=True),
    Row("MaxText", "llama3-70b", "h100", 128, 8192, 1052, 2, "full"),
    Row("torchtitan", "llama3-8b", "h100", 8, 8192, 6667, 2, "dots"),
    Row("torchtitan", "llama3-70b", "a100-80gb", 64, 8192, 331, 2, "full", fitted=True),
    Row("torchtitan", "llama3-8b", "a100-80gb", 64, 8192, 2973, 2, "dots"),
)


class Outcome(NamedTuple):
    row: Row
    predicted: float  # tokens a second and device
    error: float  # relative


@functools.cache
def experiment_of(row: Row) -> Experiment:
    """The run that a row tells of, in our terms."""
    data = to_dict(load(Experiment, CONFIGS / f"{row.config}.yaml"))
    data["data"] |= {"sequence_length": row.length, "batch_size": row.rows * row.devices, "isolate": False}
    data["train"] |= {"accumulation": 1, "remat": row.remat}
    data["mesh"] = {"data": 1, "fsdp": row.devices}
    return parse(Experiment, data)


def predict(row: Row, efficiency: float) -> float:
    """Tokens a second and device."""
    layout = Layout.of(experiment_of(row))
    return layout.step_tokens / layout.devices / times(layout, find(row.device), efficiency).step


def fit(row: Row) -> float:
    """The efficiency at which the prediction is what was published, by bisection."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predict(row, middle) < row.published else (low, middle)
    return high


@functools.cache
def _fits() -> dict[str, float]:
    """Efficiency by the device that it was fitted on."""
    return {row.device: fit(row) for row in ROWS if row.fitted}


def fitted_on(device: str) -> Row | None:
    """The row that gives a device its efficiency: one of its own kind of chip, which has the same peaks."""
    if device not in DEVICES:
        return None
    peaks = DEVICES[device].peaks
    return next((row for row in ROWS if row.fitted and DEVICES[row.device].peaks == peaks), None)


def efficiency_of(device: str) -> float:
    """What share of their peak its products reach. Where nothing published was fitted, the least of the
    fits.
    """
    row = fitted_on(device)
    return _fits()[row.device] if row else min(_fits().values())


def outcomes() -> list[Outcome]:
    """Predicted against published, for each row."""
    found = [(row, predict(row, efficiency_of(row.device))) for row in ROWS]
    return [Outcome(row, predicted, predicted / row.published - 1) for row, predicted in found]


def main(argv: list[str]) -> None:
    from launch.plan.table import console, print_calibration

    argparse.ArgumentParser(
        prog="python -m launch.plan.calibration", description=__doc__.partition(": ")[2].partition("\n")[0]
    ).parse_args(argv)
    print_calibration(console(), outcomes())


if __name__ == "__main__":
    run_command(main)
