"""All meshes of so many devices, microbatches and remat policies, ranked by the step they give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.devices import Device
from core.errors import UserError
from core.mesh import AXES
from launch.plan.plan import Plan, changed, make_plan
from llm.config import Experiment

REMAT = ("none", "dots", "full")


def sweep(experiment: Experiment, devices: int, name: str, device: Device) -> tuple[list[Plan], int]:
    """Plans on all meshes that the model and its batch divide over, the fastest first, those that fit before
    those that don't; and how many were tried.
    """
    plans = []
    for mesh in meshes(devices):
        if mesh["expert"] > 1:
            continue
        for accumulation in _accumulations(experiment, mesh):
            for remat in REMAT:
                train = {"accumulation": accumulation, "remat": remat}
                try:
                    plans.append(make_plan(changed(experiment, mesh=mesh, train=train), name, device))
                except UserError:
                    break
    plans.sort(key=lambda plan: (not plan.fits, plan.times.step))
    return plans, len(plans)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay so many devices out along the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for first in itertools.product(divisors, repeat=len(AXES) - 1):
        if devices % math.prod(first) == 0:
            yield dict(zip(AXES, (devices // math.prod(first), *first), strict=True))


def _accumulations(experiment: Experiment, mesh: dict[str, int]) -> list[int]:
    """Numbers of microbatches that leave each place whole sequences; powers of two of them."""
    places = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    rows, left = divmod(experiment.data.batch_size, places)
    return [] if left else [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]


def plot_sweep(plans: Sequence[Plan], title: str, path: Path) -> None:
    """Plot each plan's memory against its throughput as a PNG at `path`, the device's memory as a line."""
    raise NotImplementedError
