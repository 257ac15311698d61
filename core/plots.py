"""Plots of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_TRAINING, _HELDOUT, _INK, _GRID = "#2a78b5", "#d1495b", "#333333", "#e4e4e4"


def plot_loss(metrics: Sequence[Mapping[str, float | int]], path: Path) -> None:
    """Plot training and held-out loss (nats a token) against the tokens trained on, as a PNG at `path`.

    Args:
        metrics: lines as `core.metrics.read_metrics` gives them: `tokens` (so far) and `loss` in each,
            `heldout_loss` in some. Values that aren't finite leave a gap.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens, loss = _columns(metrics, "loss")
    axes.plot(tokens, loss, color=_TRAINING, alpha=0.25, linewidth=0.8)
    smooth = _smoothed(loss)
    _draw(axes, tokens, smooth, "training (smoothed)", color=_TRAINING, linewidth=2)
    heldout_tokens, heldout = _columns(metrics, "heldout_loss")
    _draw(axes, heldout_tokens, heldout, "held-out", color=_HELDOUT, linewidth=1.6, marker="o", markersize=5)
    shown = np.concatenate([smooth[len(smooth) // 20 :], heldout])
    if shown.size and shown.min() < shown.max():
        room = 0.08 * (shown.max() - shown.min())
        axes.set_ylim(shown.min() - room, shown.max() + room)  # the first steps' fall would flatten the rest
    _style(axes, "loss (nats a token)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _columns(metrics: Sequence[Mapping[str, float | int]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values (points,) of the lines that have a finite `name`."""
    rows = [(row["tokens"], row[name]) for row in metrics if name in row and np.isfinite(row[name])]
    tokens, values = np.array(rows, float).reshape(-1, 2).T
    return tokens, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a fiftieth of the run around each point, narrower at the start, one-sided at the end."""
    half, last = len(values) // 100, len(values) - 1
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    before = np.minimum(half, i)
    after = np.minimum(before, last - i)
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, **style) -> None:
    """A line, and its last value beside its name in the legend."""
    if len(x):
        axes.plot(x, y, label=f"{name}: {y[-1]:.3f}", **style)


def _style(axes: Axes, unit: str) -> None:
    axes.set_xlabel("tokens", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=_INK)
