"""What the shipped configurations of reinforcement learning reach, and what it takes them.

    python -m benchmarks.rl_returns [--runs DIR] [--only NAME ...]

Trains each with five seeds and evaluates each seed in 100 episodes of fresh environments, greedily. What was
interrupted goes on when the command is given again, and what is finished is read from its folder. The table,
in Markdown, is all that standard output gets. The exit code is 1 if a mean over seeds misses what it must
reach.

Times are of training alone, of all five seeds together, without compilation. "To reach it" is up to the first
of about 20 evaluations in a run whose mean over seeds is there; evaluations draw nothing that training
draws, and their own time isn't counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.metrics import read_metrics
from core.run import RunFolder
from rl.config import Experiment

SEEDS, EPISODES = 5, 100
EVALUATIONS = 20  # in a run, about


class Target(NamedTuple):
    """A configuration, the mean return that it must reach, and rl-baselines3-zoo's with its steps."""

    config: str
    threshold: float
    zoo: str


TARGETS = (
    Target("dqn-cartpole", 475, "500 (50k)"),
    Target("ppo-cartpole", 475, "500 (100k)"),
    Target("ppo-acrobot", -100, "-74 (1M)"),
    Target("dqn-mountaincar", -115, "-101 (120k)"),
    Target("ddpg-pendulum", -200, "-152 (20k)"),
    Target("ppo-pendulum", -200, "-172 (100k)"),
    Target("ddpg-mountaincar-continuous", 90, "93.5 (300k)"),
    Target("ppo-breakout", 28, "-"),
)
HEADER = (
    "environment", "algorithm", "config", "steps a seed", "mean return", "worst seed", "must reach",
    "reached", "zoo (steps)", "seconds", "to reach it",
)  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_returns", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/rl-returns"), metavar="DIR", help="their folder"
    )
    names = [target.config for target in TARGETS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    args = parser.parse_args(argv)
    log.setup("rl")
    devices.prepare()
    chosen = [target for target in TARGETS if target.config in args.only]
    experiments = [experiment_of(target, args.runs) for target in chosen]  # a mistake shows before the work
    for experiment in experiments:
        train(experiment)
    results = [result(*pair) for pair in zip(chosen, experiments, strict=True)]
    print(table(cells for cells, _ in results))
    if not all(reached for _, reached in results):
        raise SystemExit(1)


def experiment_of(target: Target, runs: Path) -> Experiment:
    """The shipped configuration with the seeds and episodes of the table, evaluated now and then."""
    path = Path(__file__).parents[1] / "configs" / "rl" / f"{target.config}.yaml"
    shipped = load(Experiment, path)
    every = -(-shipped.updates // EVALUATIONS) * shipped.steps_per_update
    overrides = (
        f"run.dir={runs}",
        f"train.seeds={SEEDS}",
        f"eval.episodes={EPISODES}",
        f"eval.every={shipped.eval.every or every}",
        f"checkpoint.every={shipped.checkpoint.every or every}",
    )
    return load(Experiment, path, overrides)


def train(experiment: Experiment) -> None:
    """Train to the end what isn't yet.

    Raises:
        UserError: if the folder holds a run of another configuration, or the training was interrupted.
    """
    run = RunFolder(experiment.run.folder)
    if run.summary.exists():
        _require_same(load(Experiment, run.config), experiment)
        return
    from rl import loop  # only now, so that --help answers at once

    log.console.print(f"{run.path}: {experiment.env.name} with {experiment.algorithm}", soft_wrap=True)
    with contextlib.redirect_stdout(sys.stderr):
        loop.train(experiment, resume=True)
    if not run.summary.exists():
        raise UserError("interrupted: the same command goes on")


def _require_same(saved: Experiment, now: Experiment) -> None:
    """That what was computed is what would be: evaluations in between change nothing, nor does the place."""
    there = dataclasses.replace(saved, run=now.run, mesh=now.mesh, checkpoint=now.checkpoint, eval=now.eval)
    if there != now or saved.eval.episodes != now.eval.episodes:
        raise UserError(
            f"{now.run.folder} holds a run of another configuration: delete it, or choose another --runs"
        )


def result(target: Target, experiment: Experiment) -> tuple[tuple[str, ...], bool]:
    """The cells of a finished run, and whether it reached what it must."""
    run = RunFolder(experiment.run.folder)
    summary = json.loads(run.summary.read_text())
    reached = summary["eval_return_mean"] >= target.threshold
    seconds = seconds_to(target.threshold, read_metrics(run.metrics), experiment.train.seeds)
    cells = (
        experiment.env.name,
        experiment.algorithm,
        target.config,
        f"{experiment.train.steps:,}",
        f"{summary['eval_return_mean']:.1f}",
        f"{summary['eval_return_worst_seed']:.1f}",
        f"{target.threshold:g}",
        "yes" if reached else "**no**",
        target.zoo,
        f"{summary['train_seconds']:.0f}",
        "-" if seconds is None else f"{seconds:.0f}",
    )
    return cells, reached


def seconds_to(
    threshold: float | int, metrics: Sequence[Mapping[str, float | int]], seeds: int
) -> float | None:
    """Seconds of training up to the first evaluation that is at the threshold; None where none is."""
    seconds, before = 0.0, 0
    for line in metrics:
        seconds += (line["step"] - before) * seeds / line["steps_per_second"]
        before = int(line["step"])
        if line.get("eval_return_mean", -float("inf")) >= threshold:
            return seconds
    return None


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    run_command(main)
