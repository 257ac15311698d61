"""Pictures of an inspection. Each function returns a figure; tokens come as labels (`llm.inspect.labels`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from core.plots import BLUE, INK, RED, new_figure
from llm.inspect.labels import FONT
from llm.inspect.lens import HeadFigures

# From near white to near black through the blue of all plots.
_STOPS = ["#f3f6f9", "#a9cbe4", BLUE, "#0c2c47"]
SHADES = LinearSegmentedColormap.from_list("shades", _STOPS).with_extremes(bad="white")

LABELS_PER_PANEL = 26  # tokens named along a map; of more, every second, third, ...
LENS_COLUMNS = 16  # positions side by side in the logit lens, the others below
LENS_LAYERS = 16  # rows of it; of more layers, as many as that, evenly spread
BARS_LABELED = 64
NAMED_BEFORE = 6  # tokens named above the next ones


def plot_attention(
    maps: Float[np.ndarray, "N S S"], titles: Sequence[str], tokens: Sequence[str], columns: int
) -> Figure:
    """Attention maps as small multiples: a row for each query, a column for each key it sees."""
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(2.0 + 2.6 * columns, 1.2 + 2.8 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    seen = np.tri(len(tokens), dtype=bool)
    for panel, weights, title in zip(panels.flat, maps, titles, strict=False):
        image = panel.imshow(np.where(seen, weights, np.nan), cmap=SHADES, vmin=0, vmax=1, aspect="auto")
        panel.set_title(title, fontsize=9, color=INK)
    for panel in panels.flat:
        _bare(panel)
    for panel in panels.flat[len(maps) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        _name_tokens(panel, "y", tokens, LABELS_PER_PANEL)
    for column in range(columns):
        lowest = panels[(len(maps) - 1 - column) // columns, column]
        _name_tokens(lowest, "x", tokens, LABELS_PER_PANEL)
        lowest.tick_params(labelbottom=True)
    figure.supxlabel("token attended to (key); · is a space", fontsize=9, color=INK)
    figure.supylabel("token that attends (query)", fontsize=9, color=INK)
    _color_bar(figure, image, panels, "attention weight")
    return figure


def plot_heads(figures: HeadFigures) -> Figure:
    """Where each head looks: for each figure a map over heads and layers, the last on top."""
    titles = {
        "first": "weight on the first token",
        "previous": "weight on the previous token",
        "itself": "weight on the token itself",
        "entropy": "entropy of the weights",
    }
    layers, heads = figures.first.shape
    figure = new_figure(2.6 * 4, 1.2 + min(8.0, max(1.2, 0.42 * layers)))
    panels = figure.subplots(1, 4, sharey=True)
    images = []
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        values = getattr(figures, name)
        top = 1 if name != "entropy" else max(1.0, float(values.max()))
        image = panel.imshow(values, cmap=SHADES, vmin=0, vmax=top, aspect="auto", origin="lower")
        panel.set_title(title, fontsize=9, color=INK)
        panel.set_xlabel("head", fontsize=9, color=INK)
        _bare(panel)
        _number(panel, "x", heads)
        if layers <= 16 and heads <= 8:
            for (layer, head), value in np.ndenumerate(values):
                color = _readable_on(float(value) / top)
                panel.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        images.append(image)
    _number(panels[0], "y", layers)
    panels[0].set_ylabel("layer", fontsize=9, color=INK)
    _color_bar(figure, images[0], list(panels[:3]), "mean attention weight")
    _color_bar(figure, images[3], panels[3], "nats")
    return figure


def plot_next_tokens(
    read: Sequence[str], tokens: Sequence[str], probabilities: Float[np.ndarray, " N"]
) -> Figure:
    """The likeliest tokens after those that were `read` as bars, the likeliest on top."""
    figure = new_figure(6.5, 0.9 + 0.28 * len(tokens))
    axes = figure.subplots()
    rows = range(len(tokens))
    axes.barh(rows, probabilities, color=BLUE, height=0.7)
    for row, probability in zip(rows, probabilities, strict=True):
        axes.annotate(
            f"{probability:.3f}",
            (float(probability), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(rows, tokens, fontfamily=FONT, fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * float(probabilities.max()))
    axes.set_xlabel("probability of the next token (· is a space)", fontsize=9, color=INK)
    end = " ".join(["…", *read[-NAMED_BEFORE:]] if len(read) > NAMED_BEFORE else read)
    axes.set_title(f"after  {end}", fontfamily=FONT, fontsize=9, color=INK, loc="left", parse_math=False)
    axes.tick_params(axis="x", labelsize=8)
    _bare(axes)
    return figure


def plot_lens(
    tokens: Sequence[str],
    predicted: Sequence[Sequence[str]],
    probabilities: Float[np.ndarray, "L S"],
    right: np.ndarray,
) -> Figure:
    """The logit lens: a row for each layer, the last on top; a column for each position.

    Args:
        tokens: the S that were read.
        predicted: for each layer and position, the token most likely to follow.
        probabilities: of those.
        right: bool [L, S], where that token is the one that does follow.
    """
    last = len(predicted) - 1
    layers = sorted({round(i) for i in np.linspace(0, last, min(last + 1, LENS_LAYERS))})
    columns, parts = min(len(tokens), LENS_COLUMNS), math.ceil(len(tokens) / LENS_COLUMNS)
    figure = new_figure(1.7 + 0.62 * max(columns, 6), 0.6 + parts * (0.24 * len(layers) + 0.75))
    panels = figure.subplots(parts, 1, squeeze=False)[:, 0]
    for part, panel in enumerate(panels):
        here = slice(part * columns, min((part + 1) * columns, len(tokens)))
        width = here.stop - here.start
        image = panel.imshow(
            probabilities[layers, here],
            cmap=SHADES,
            vmin=0,
            vmax=1,
            aspect="auto",
            origin="lower",
        )
        panel.set_xlim(-0.5, columns - 0.5)
        for row, layer in enumerate(layers):
            for column in range(width):
                position = here.start + column
                color = _readable_on(float(probabilities[layer, position]))
                style = {"fontfamily": FONT, "fontsize": 6.5, "color": color, "parse_math": False}
                panel.text(column, row, predicted[layer][position], ha="center", va="center", **style)
                if right[layer, position]:
                    panel.add_patch(_frame(column, row))
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
        panel.set_xticks(
            range(width), tokens[here], fontfamily=FONT, fontsize=7, rotation=30, parse_math=False
        )
        for label in panel.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        panel.set_ylabel("layer", fontsize=9, color=INK)
        _bare(panel)
    figure.supxlabel(
        "token read (· is a space); framed: the token predicted is the one that follows",
        fontsize=9,
        color=INK,
    )
    _color_bar(figure, image, list(panels), "probability of\nthe likeliest next token")
    return figure


def plot_surprisal(tokens: Sequence[str], surprisal: Float[np.ndarray, " N"]) -> Figure:
    """What each token but the first cost the model, and the mean."""
    named = tokens[1:]
    figure = new_figure(min(12.0, max(5.0, 1.2 + 0.27 * len(named))), 3.2)
    axes = figure.subplots()
    axes.bar(range(len(named)), surprisal, color=BLUE, width=0.75)
    mean = float(surprisal.mean())
    axes.axhline(mean, color=RED, linewidth=1.2)
    axes.annotate(
        f"mean {mean:.2f}",
        (1, mean),
        (2, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=RED,
        annotation_clip=False,
    )
    axes.set_xlim(-0.6, len(named) - 0.4)
    axes.set_ylabel("surprisal (nats)", fontsize=9, color=INK)
    axes.set_xlabel("token (· is a space)", fontsize=9, color=INK)
    _name_tokens(axes, "x", named, BARS_LABELED, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _name_tokens(
    axes: Axes, side: str, tokens: Sequence[str], room: int, fontsize: int | float = 6.5
) -> None:
    """Label an axis with tokens, or with every second, third, ... where there is no room for all."""
    shown = range(0, len(tokens), math.ceil(len(tokens) / room))
    style: dict[str, Any] = {"fontfamily": FONT, "fontsize": fontsize, "parse_math": False}
    if side == "x":
        axes.set_xticks(shown, [tokens[i] for i in shown], rotation=90, **style)
    else:
        axes.set_yticks(shown, [tokens[i] for i in shown], **style)


def _number(axes: Axes, side: str, count: int) -> None:
    shown = range(0, count, math.ceil(count / 16))
    (axes.set_xticks if side == "x" else axes.set_yticks)(shown, [str(i) for i in shown], fontsize=8)


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=RED, linewidth=1.1)


def _readable_on(shade: float) -> str:
    return "white" if shade > 0.45 else INK


def _color_bar(figure: Figure, image, panels, name: str) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=0.9, aspect=24, pad=0.015)
    bar.set_label(name, fontsize=9, color=INK)
    bar.ax.tick_params(colors=INK, length=0, labelsize=8)
    bar.outline.set_visible(False)
