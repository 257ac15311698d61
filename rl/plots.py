"""Plots of reinforcement learning runs, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.plots import BLUE, new_figure, save, style
from rl.curve import smoothed

_PREFIX = "episode_return_seed_"


def plot_returns(metrics: Sequence[Mapping[str, float | int]], path: Path, name: str) -> None:
    """Plot the return of training episodes against environment steps, as a PNG at `path`.

    Of several seeds the line is the median and the band goes from the first to the third quartile.

    Args:
        metrics: lines as `core.metrics.read_metrics` gives them, `episode_return_seed_K` in some.
    """
    seeds = sorted({key for line in metrics for key in line if key.startswith(_PREFIX)})
    if not seeds:
        return
    steps = np.array([line["step"] for line in metrics], float)
    curves = np.stack([smoothed([line.get(seed, np.nan) for line in metrics]) for seed in seeds])
    some = ~np.isnan(curves).all(0)
    steps, curves = steps[some], curves[:, some]
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    low, middle, high = np.nanquantile(curves, [0.25, 0.5, 0.75], axis=0)
    label = f"median of {len(seeds)} seeds, and quartiles" if len(seeds) > 1 else None
    axes.plot(steps, middle, color=BLUE, linewidth=2, label=label)
    if len(seeds) > 1:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
    style(axes, "return of training episodes", f"environment steps, {name}")
    save(figure, path)
