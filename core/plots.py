"""Plots of a run, as PNG files."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

BLUE, RED, INK, GRID = "#2a78b5", "#d1495b", "#333333", "#e4e4e4"
COLORS = (BLUE, RED, "#3b9c6b", "#8a5fb0", "#d98c2b", "#7a7a7a")  # of runs beside each other
_COURSES = ("#9a9a9a", RED, BLUE)


def plot_loss(
    metrics: Sequence[Mapping[str, float | int]],
    path: Path,
    against: str = "tokens",
    label: str = "loss (nats a token)",
) -> None:
    """Plot training and held-out loss against what was trained on, as a PNG at `path`.

    Args:
        metrics: lines as `core.metrics.read_metrics` gives them: `against` (so far) and `loss` in each,
            `heldout_loss` in some. Values that aren't finite leave a gap.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    seen, loss = _columns(metrics, "loss", against)
    axes.plot(seen, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    smooth = _smoothed(loss)
    _draw(axes, seen, smooth, "training (smoothed)", color=BLUE, linewidth=2)
    heldout_seen, heldout = _columns(metrics, "heldout_loss", against)
    _draw(axes, heldout_seen, heldout, "held-out", color=RED, linewidth=1.6, marker="o", markersize=5)
    shown = np.concatenate([smooth[len(smooth) // 20 :], heldout])
    if shown.size and shown.min() < shown.max():
        room = 0.08 * (shown.max() - shown.min())
        axes.set_ylim(shown.min() - room, shown.max() + room)  # the first steps' fall would flatten the rest
    style(axes, label, against)
    save(figure, path)


def new_figure(width: int | float, height: int | float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_by_position(starts: np.ndarray, losses: Mapping[str, np.ndarray], path: Path) -> None:
    """Plot mean loss (nats a token) over pieces of a window, a line a name with its mean, as a PNG at `path`.

    Args:
        starts: [pieces] the first position of each piece, all of one length.
        losses: [pieces] for each name.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for (name, loss), color in zip(losses.items(), itertools.cycle(COLORS), strict=False):
        label = textwrap.fill(f"{name}: {loss.mean():.3f}", 60)
        axes.plot(starts + starts[1] / 2, loss, label=label, color=color, linewidth=1.6)
    style(axes, "held-out loss (nats a token)", "position (tokens of context before)")
    save(figure, path)


def _columns(
    metrics: Sequence[Mapping[str, float | int]], name: str, against: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values (points,) of `against` and `name` in the lines that have a finite `name`."""
    rows = [(row[against], row[name]) for row in metrics if name in row and np.isfinite(row[name])]
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


def style(axes: Axes, unit: str, against: str = "tokens") -> None:
    """Label both axes, and leave nothing but the grid and the lower edge around what is drawn."""
    axes.set_xlabel(against, color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)


class Course(NamedTuple):
    """A run as a plot of its course needs it."""

    metrics: Sequence[Mapping[str, float | int]]  # lines with `step` and `loss`
    rewinds: Sequence[Any]  # each with `restored`, `step` and `lost_loss`, as in `rewinds.jsonl`


def plot_courses(panels: Sequence[Mapping[str, Course]], path: Path) -> None:
    """Plot the loss of runs against their steps, a panel for each group, and thin what rewinds gave up."""
    figure = new_figure(8, 3.8 * len(panels))
    for axes, courses in zip(np.atleast_1d(figure.subplots(len(panels))), panels, strict=True):
        for (name, course), color in zip(courses.items(), _COURSES, strict=False):
            _draw_course(axes, name, course, color)
        style(axes, "loss (nats a token)", "steps")
    save(figure, path)


def _draw_course(axes: Axes, name: str, course: Course, color: str) -> None:
    steps, loss = _columns(course.metrics, "loss", "step")
    axes.plot(steps, _smoothed(loss), color=color, linewidth=1.6, label=name)
    for rewind in course.rewinds:
        lost = [np.nan if value is None else value for value in rewind.lost_loss]
        axes.plot(rewind.restored + 1 + np.arange(len(lost)), lost, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(rewind.step, lost[-1], marker="x", color=color)


def plot_monitor(course: Course, limits: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot loss and gradient norm by step, each under the limit that made a spike of what stood above it.

    Args:
        limits: `core.divergence.Monitor.limits` before each line of the course's metrics.
    """
    figure = new_figure(8, 6)
    names = {"loss": "loss (nats a token)", "grad_norm": "gradient norm"}
    steps = np.array([line["step"] for line in course.metrics])
    for axes, (name, label) in zip(figure.subplots(2, sharex=True), names.items(), strict=True):
        axes.plot(*_columns(course.metrics, name, "step"), color=BLUE, linewidth=0.8, label="each step")
        limit = np.array([line[name] for line in limits])
        axes.plot(steps, limit, color=RED, linewidth=1.2, linestyle="--", label="limit")
        for i, rewind in enumerate(course.rewinds):
            shade = {"color": INK, "alpha": 0.1, "linewidth": 0}
            axes.axvspan(rewind.restored, rewind.step, label=None if i else "given up by a rewind", **shade)
            if name == "loss":
                lost = [np.nan if value is None else value for value in rewind.lost_loss]
                given_up = rewind.restored + 1 + np.arange(len(lost))
                axes.plot(given_up, lost, color=INK, linewidth=0.8)
        if name == "grad_norm":
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
        style(axes, label, "step")
    axes.get_legend().remove()  # the upper panel's serves both
    save(figure, path)


def plot_growth(panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Plot how time and memory grow along axes, measured (points) and by arithmetic (dashed), both log.

    Args:
        panels: by axis, by value on it: `time` and `memory` over those of the axis's first value, the times'
            quartiles as `time_low` and `time_high`, and both ratios with `_by_arithmetic` added to the name.
    """
    rows = -(-len(panels) // 2)
    figure = new_figure(8, 3.4 * rows)
    places = figure.subplots(rows, 2, squeeze=False, sharey=True).flat
    for axes, (name, points) in zip(places, panels.items(), strict=False):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        at = [float(value) for value in points]
        columns = {key: [point[key] for point in points.values()] for key in next(iter(points.values()))}
        for quantity, color in (("time", BLUE), ("memory", RED)):
            axes.plot(at, columns[f"{quantity}_by_arithmetic"], color=color, linewidth=1.2, linestyle="--")
            axes.plot(at, columns[quantity], color=color, marker="o", linestyle="", label=quantity)
        axes.vlines(at, columns["time_low"], columns["time_high"], color=BLUE, linewidth=1.2)
        style(axes, "times the first (dashed: by arithmetic)", name)
        axes.set_xticks(at, list(points))
        axes.yaxis.set_major_formatter("{x:g}")
    save(figure, path)
