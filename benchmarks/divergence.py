"""Two real divergences, each left alone and healed: a damaged stretch of data, and too high a rate.

    python -m benchmarks.divergence [--steps N] [--out runs/divergence]

Each run is the quickstart's model on the quickstart's text, at a constant rate. The damage is what a shard
with its tokens overwritten would give if it were read in order: batches of noise, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.metrics import read_metrics
from core.plots import Course, plot_courses
from core.rewind import read_rewinds
from core.run import RunFolder
from llm.config import Experiment

SETTINGS = (
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=50",
    "eval.prompts=[]",
    "eval.every=20",
    "eval.batches=16",
    "divergence.watch.heldout_loss=min",
    "checkpoint.every=50",
    "checkpoint.keep=4",
)
ALONE = ("divergence.threshold=1e9", "divergence.patience=1000000000")  # NaN still counts
TOO_HIGH = (
    "optimizer.learning_rate=0.2",
    "optimizer.warmup_steps=600",
)  # the rate climbs past what is stable
RUNS = {
    "clean": (),
    "damaged data, left alone": ALONE,
    "damaged data, healed": (),
    "too high a rate, left alone": (*TOO_HIGH, *ALONE),
    "too high a rate, stopped": TOO_HIGH,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/divergence"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/divergence.png"))
    options = parser.parse_args(argv)
    log.setup("llm")
    devices.prepare()
    for name, settings in RUNS.items():
        with _damage(options.steps) if "damaged" in name else contextlib.nullcontext():
            _train(options, name, settings)
    courses = {name: _course(options.out / _folder(name)) for name in RUNS}
    pairs = [[name for name in RUNS if word in name] for word in ("damaged", "rate")]
    panels = [{name: courses[name] for name in ("clean", *pair)} for pair in pairs]
    plot_courses(panels, options.plot)
    for name, (metrics, rewinds) in courses.items():
        last = next(line for line in reversed(metrics) if "heldout_loss" in line)
        print(
            f"{name:28} {len(rewinds)} rewinds; step {last['step']}: held-out loss {last['heldout_loss']:.3f}"
        )
        for r in rewinds:
            print(f"{'':28} step {r.step}: {r.reason}; back to {r.restored}, past {r.skipped}")


def _folder(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _train(options: argparse.Namespace, name: str, settings: tuple[str, ...]) -> None:
    from llm.loop import train

    place = (f"run.name={_folder(name)}", f"run.dir={options.out}", f"train.steps={options.steps}")
    experiment = load(Experiment, "configs/llm/quickstart.yaml", [*SETTINGS, *settings, *place])
    shutil.rmtree(experiment.run.folder, ignore_errors=True)
    try:
        train(experiment)
    except UserError as error:  # which is what a run that can't be healed ends with
        if "stopped" not in name:
            raise
        print(f"error: {error}")


@contextlib.contextmanager
def _damage(steps: int) -> Iterator[None]:
    """Noise in place of the tokens of thirty batches in the middle."""
    import llm.loop

    make, damaged = llm.loop.train_batch, range(steps // 2, steps // 2 + 30)

    def read(dataset, number, *rest):
        batch = make(dataset, number, *rest)
        if number not in damaged:
            return batch
        noise = np.random.default_rng(number).integers(0, 2048, (2, *batch.tokens.shape), dtype=np.int32)
        return batch._replace(tokens=noise[0], targets=noise[1])

    with mock.patch.object(llm.loop, "train_batch", read):
        yield


def _course(folder: Path) -> Course:
    run = RunFolder.open(folder)
    return Course(read_metrics(run.metrics), read_rewinds(run.rewinds))


if __name__ == "__main__":
    run_command(main)
