"""What a finished run tells: its evaluation, the curve of its training, the figures."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from core.metrics import read_metrics
from core.run import RunFolder
from rl.config import Experiment
from rl.curve import draw
from rl.plots import plot_returns


def finish(run: RunFolder, experiment: Experiment, returns: np.ndarray, lengths: np.ndarray) -> None:
    """Write `summary.json` and the plot, and print the evaluation.

    Args:
        returns, lengths: [seeds, episodes] of the last evaluation.
    """
    metrics = read_metrics(run.metrics)
    by_seed = {f"eval_return_seed_{experiment.seed + i}": float(row.mean()) for i, row in enumerate(returns)}
    seconds = 0.0
    before = 0
    for line in metrics:
        seconds += (line["step"] - before) * experiment.train.seeds / line["steps_per_second"]
        before = int(line["step"])
    summary = {
        "eval_return_mean": float(returns.mean()),
        "eval_return_std": float(returns.std()),  # over all episodes
        "eval_return_worst_seed": min(by_seed.values()),
        "eval_length_mean": float(lengths.mean()),
        "eval_episodes": returns.size,
        **by_seed,
        "environment_steps": experiment.train.steps,  # of each seed
        "train_seconds": seconds,  # without compilation
        "steps_per_second": median(line["steps_per_second"] for line in metrics),  # of all seeds together
    }
    run.write_summary(summary)
    plot_returns(metrics, run.plots / "returns.png", experiment.env.name)
    _print(run, experiment, returns, summary)


def _print(run: RunFolder, experiment: Experiment, returns: np.ndarray, summary: dict) -> None:
    console = Console(highlight=False)
    points = [(int(m["step"]), m.get("episode_return", math.nan)) for m in read_metrics(run.metrics)]
    console.out(draw(points, experiment.train.steps, "return of training episodes"), highlight=False)
    console.print(f"{experiment.env.name}: {returns.shape[1]} greedy episodes in fresh environments")
    table = Table()
    for name in ("seed", "mean return", "std", "least", "most"):
        table.add_column(name, justify="right")
    for i, row in enumerate(returns):
        figures = (f"{x:,.2f}" for x in (row.mean(), row.std(), row.min(), row.max()))
        table.add_row(str(experiment.seed + i), *figures)
    if len(returns) > 1:
        figures = (f"{x:,.2f}" for x in (returns.mean(), returns.std(), returns.min(), returns.max()))
        table.add_row("all", *figures, style="bold")
    console.print(table)
    steps = experiment.train.steps * experiment.train.seeds
    console.print(f"{steps:,} environment steps in {summary['train_seconds']:.1f} s")
    console.print(f"curve: {run.plots / 'returns.png'}   figures: {run.summary}", soft_wrap=True)
