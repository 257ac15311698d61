"""Pictures of what a model takes images for. Each function returns a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from core.plots import BLUE, COLORS, GRID, INK, new_figure

# From near white to near black through the blue of all plots.
SHADES = LinearSegmentedColormap.from_list("shades", ["#f3f6f9", "#a9cbe4", BLUE, "#0c2c47"])

NAMED = 80  # classes named along a side; of more, every second, third, ...
COUNTED = 16  # classes, at most, whose counts stand in the cells of a confusion matrix
_LIGHT_BLUE, _LIGHT_RED, _LIGHT = "#b9d6ea", "#f0bfc5", "#e1e4e8"


class Case(NamedTuple):
    """An image and what the model makes of it.

    Attributes:
        image: as the model sees it.
        truth: what is on it.
        choices: the likeliest texts with their probabilities, the likeliest first.
    """

    image: UInt8[np.ndarray, "H W 3"]
    truth: str
    choices: Sequence[tuple[str, float]]

    @property
    def hit(self) -> bool:
        return self.choices[0][0] == self.truth


def plot_cases(cases: Sequence[Case], title: str = "", columns: int = 3) -> Figure:
    """Hits, then misses: each image, what is on it, and what the model holds most likely.

    Blue is what is on it, red what the model prefers to that.
    """
    parts = [
        (name, [case for case in cases if case.hit == hit])
        for name, hit in (("hits", True), ("misses", False))
    ]
    parts = [(name, part) for name, part in parts if part]
    rows = [math.ceil(len(part) / columns) for _, part in parts]
    figure = new_figure(3.5 * columns, 0.4 + sum(0.35 + 1.35 * count for count in rows))
    if title:
        figure.suptitle(title, fontsize=10, color=INK, parse_math=False)
    places = figure.subfigures(
        len(parts), 1, height_ratios=[0.35 + 1.35 * count for count in rows], squeeze=False
    )
    for place, (name, part), count in zip(places[:, 0], parts, rows, strict=True):
        place.suptitle(name, fontsize=10, fontweight="bold", color=INK, x=0.01, ha="left")
        _draw_cases(place, part, count, columns)
    return figure


def _draw_cases(place: SubFigure, cases: Sequence[Case], rows: int, columns: int) -> None:
    axes = place.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 2.1] * columns)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        picture, bars = axes[row, 2 * column], axes[row, 2 * column + 1]
        for panel in (picture, bars):
            panel.set_axis_off()
        if number < len(cases):
            picture.imshow(cases[number].image)
            _draw_choices(bars, cases[number])


def _draw_choices(axes: Axes, case: Case) -> None:
    for row, (text, probability) in enumerate(case.choices):
        color = _LIGHT_BLUE if text == case.truth else _LIGHT_RED if row == 0 else _LIGHT
        axes.barh(row, 1, color="#f6f7f9", height=0.84)
        axes.barh(row, probability, color=color, height=0.84)
        axes.text(0.02, row, _cut(text, 29), va="center", fontsize=7.5, color=INK, parse_math=False)
        axes.text(1.02, row, f"{probability:.2f}", va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, 1.16)
    axes.set_ylim(len(case.choices) - 0.4, -0.6)
    truth = textwrap.fill(case.truth, 38, max_lines=2, placeholder=" …")
    axes.set_title(truth, fontsize=8, color=INK, loc="left", pad=3, parse_math=False)


def plot_confusion(confusion: Int[np.ndarray, "C C"], names: Sequence[str], title: str = "") -> Figure:
    """What the images of each class (a row) were taken for, as shares of it; few classes with counts.

    Classes without images have no row.
    """
    asked = np.flatnonzero(confusion.sum(axis=1))
    confusion, count = confusion[asked], len(names)
    size = 0.5 if count <= COUNTED else 0.15
    width, height = (1.2 + size * min(number, NAMED) for number in (count, len(asked)))
    margin = 0.07 * max(map(len, names))
    figure = new_figure(width + margin + 0.9, height + margin + (0.3 if title else 0))
    axes = figure.subplots()
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1)
    if count <= COUNTED:
        for (row, column), value in np.ndenumerate(confusion):
            if value:
                color = "white" if shares[row, column] > 0.45 else INK
                axes.text(column, row, str(value), ha="center", va="center", fontsize=7.5, color=color)
    fontsize = 8 if count <= COUNTED else 6
    columns, rows = (range(0, number, math.ceil(number / NAMED)) for number in (count, len(asked)))
    axes.set_xticks(columns, [names[i] for i in columns], rotation=90, fontsize=fontsize, parse_math=False)
    axes.set_yticks(rows, [names[asked[i]] for i in rows], fontsize=fontsize, parse_math=False)
    axes.set_xlabel("taken for", fontsize=9, color=INK)
    axes.set_ylabel("class", fontsize=9, color=INK)
    if title:
        axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    _bare(axes)
    _color_bar(figure, image, axes, "share of the class")
    return figure


def plot_similarity(
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    captions: Sequence[str],
    similarity: Float[np.ndarray, "N N"],
) -> Figure:
    """Cosine similarity of each image (a column) and each caption (a row); the pairs are on the diagonal."""
    count = len(images)
    labels = [_cut(caption, 48) for caption in captions]
    margin = 0.075 * max(map(len, labels))
    figure = new_figure(1.2 + 0.55 * count + margin, 0.9 + 0.55 * count)
    axes = figure.subplots()
    low, high = float(similarity.min()), float(similarity.max())
    shown = axes.imshow(similarity, cmap=SHADES, vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(similarity):
        color = "white" if (value - low) / max(high - low, 1e-9) > 0.45 else INK
        weight = "bold" if row == column else "normal"
        text = f"{value:.2f}".replace("0.", ".")
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color, fontweight=weight)
    axes.set_yticks(range(count), labels, fontsize=8, parse_math=False)
    axes.set_xticks([])
    for column, image in enumerate(images):
        picture = OffsetImage(image, zoom=34 / max(image.shape[:2]), interpolation="antialiased")
        above: dict[str, Any] = {"xybox": (0, 2), "boxcoords": "offset points", "box_alignment": (0.5, 0)}
        at = AnnotationBbox(picture, (column, -0.5), frameon=False, pad=0, annotation_clip=False, **above)
        axes.add_artist(at)
    _bare(axes)
    _color_bar(figure, shown, axes, "cosine similarity")
    return figure


def plot_towers(
    images: Float[np.ndarray, "N 2"], texts: Float[np.ndarray, "M 2"], of_images: Sequence[str],
    of_texts: Sequence[str], title: str = "",
) -> Figure:  # fmt: skip
    """Both towers' embeddings in the plane: an image is a dot, a text a cross, colored by group.

    Args:
        of_images, of_texts: the group of each, by its name.
    """
    figure = new_figure(8, 5.6)
    axes = figure.subplots()
    groups = list(dict.fromkeys([*of_texts, *of_images]))
    colors = {group: _color(number, len(groups)) for number, group in enumerate(groups)}
    own = [colors[group] for group in of_images]
    axes.scatter(images[:, 0], images[:, 1], c=own, s=13, alpha=0.75, linewidths=0)
    axes.scatter(
        texts[:, 0],
        texts[:, 1],
        c=[colors[group] for group in of_texts],
        s=60,
        marker="X",
        edgecolors=INK,
        linewidths=0.7,
    )
    marks = [_mark("o", INK, "an image"), _mark("X", INK, "a caption")]
    marks += [_mark("s", colors[group], group) for group in groups]
    axes.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if title:
        axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    return figure


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _mark(marker: str, color, label: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=marker, color=color, label=label, markersize=7, markeredgewidth=0
    )


def _color(number: int, count: int):
    from matplotlib import colormaps

    return COLORS[number] if count <= len(COLORS) else colormaps["tab20"](number % 20)


def _bare(axes: Axes) -> None:
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _color_bar(figure: Figure, image, axes: Axes, name: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02)
    bar.set_label(name, fontsize=9, color=INK)
    bar.ax.tick_params(colors=INK, length=0, labelsize=8)
    bar.outline.set_visible(False)
