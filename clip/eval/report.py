"""What an evaluation tells: tables to read, CSV files to go on with, figures in the run's summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from clip.eval.retrieval import RECALLS
from clip.eval.zero_shot import Classification
from core.files import write_atomically
from core.run import RunFolder

_CLASSES = 24  # in the table; of more, the best and the worst


def figures_of(result: Classification, name: str = "zero_shot") -> dict[str, float]:
    """A classification's figures as `summary.json` has them."""
    low, high = result.interval
    return {
        f"{name}_accuracy": result.accuracy,
        f"{name}_accuracy_low": low,
        f"{name}_accuracy_high": high,
        f"{name}_top5": result.top(5),
        f"{name}_chance": result.chance(),
        f"{name}_majority": result.majority(),
        f"{name}_classes": result.num_classes,
        f"{name}_images": len(result.labels),
    }


def merge_summary(run: RunFolder, figures: Mapping[str, Any]) -> None:
    """Put figures into `summary.json` beside those there, in place of older ones of the same name."""
    run.write_summary({**run.read_summary(), **figures})


def classification_table(results: Mapping[str, Classification]) -> Table:
    """Top-1 and top-5 beside chance and majority, for each set of classes to choose from, by its name."""
    count = len(next(iter(results.values())).labels)
    table = Table(title=f"zero-shot classification of {count:,} images", title_justify="left")
    table.add_column("")
    for column in ("top-1", "95% interval", "top-5"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        low, high = result.interval
        table.add_section()
        table.add_row(Text(name, style="italic"))
        table.add_row("  chance", f"{result.chance():.1%}", "", f"{result.chance(5):.1%}")
        table.add_row("  the most frequent", f"{result.majority():.1%}", "", f"{result.majority(5):.1%}")
        shown = (f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{result.top(5):.1%}")
        table.add_row("  this model", *shown, style="bold")
    return table


def class_table(names: Sequence[str], result: Classification) -> Table:
    """Each class that has images, the best first: how many, how many right, and what it is mostly taken for
    instead.
    """
    ordered = [
        int(i) for i in np.argsort(-np.nan_to_num(result.per_class), kind="stable") if result.counts[i]
    ]
    half = _CLASSES // 2
    left_out = len(ordered) - _CLASSES
    shown = ordered if left_out <= 0 else [*ordered[:half], *ordered[-half:]]
    title = "by class" if left_out <= 0 else f"by class: the best and the worst {half} of {len(ordered)}"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("images", "right"):
        table.add_column(column, justify="right")
    table.add_column("else mostly taken for")
    for i in shown:
        others = np.where(np.arange(len(names)) == i, 0, result.confusion[i])
        other = int(others.argmax())
        instead = f"{names[other]} ({others[other] / result.counts[i]:.0%})" if others[other] else ""
        table.add_row(Text(names[i]), f"{result.counts[i]:,}", f"{result.per_class[i]:.0%}", Text(instead))
    return table


def retrieval_table(figures: Mapping[str, float], chance: Mapping[str, float], title: str) -> Table:
    """Recalls both ways beside those of chance."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for k in RECALLS:
        table.add_column(f"recall@{k}", justify="right")
    for way, name in (("image_to_text", "image to caption"), ("text_to_image", "caption to image")):
        keys = [f"{way}_recall_at_{k}" for k in RECALLS]
        table.add_row(f"{name}, chance", *(f"{chance[key]:.1%}" for key in keys))
        table.add_row(f"{name}, this model", *(f"{figures[key]:.1%}" for key in keys), style="bold")
    return table


def write_confusion(path: Path, names: Sequence[str], result: Classification) -> None:
    """The confusion matrix as CSV: a row for each class, a column for what its images were taken for."""
    _write_csv(
        path, [["class", *names], *([name, *row] for name, row in zip(names, result.confusion, strict=True))]
    )


def write_classes(path: Path, names: Sequence[str], result: Classification) -> None:
    """Images, hits and accuracy of each class, as CSV; no accuracy where there are no images."""
    hits = np.diagonal(result.confusion)
    rows = [
        [name, images, right, f"{right / images:.6g}" if images else ""]
        for name, images, right in zip(names, result.counts, hits, strict=True)
    ]
    _write_csv(path, [["class", "images", "hits", "accuracy"], *rows])


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())
