"""A curve in the terminal, drawn with Braille dots, two across and four down in each character."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.text import Text

from core.log import console, progress

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_WIDTH, _HEIGHT = 60, 10  # characters
_WINDOW = 5  # lines of metrics that a point is the mean of

Show = Callable[[int, Sequence[tuple[int, float]], str], None]  # steps done, points of the curve, status


@contextlib.contextmanager
def live(name: str, total: int, done: int, title: str) -> Iterator[Show]:
    """A progress bar under a growing curve; without a terminal, a line now and then."""
    if not console.is_terminal:
        with progress(name, total, done) as update:
            yield lambda done, points, status: update(done, status)
        return
    columns = ("{task.description}", BarColumn(), "{task.fields[status]}", TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(name, total=total, completed=done, status="")
    with Live(bar, console=console, refresh_per_second=8, transient=True) as screen:  # a report draws it too

        def show(done: int, points: Sequence[tuple[int, float]], status: str) -> None:
            bar.update(task, completed=done, status=f"{done:,}/{total:,}  {status}")
            screen.update(Group(Text(draw(points, total, title), no_wrap=True), bar))

        yield show


def draw(points: Sequence[tuple[int, float]], total: int, title: str, width: int = _WIDTH) -> str:
    """The curve through `points` (x, y) on an axis from 0 to `total`, with its range beside it."""
    mean = smoothed([y for _, y in points])
    points = [(x, y) for (x, _), y in zip(points, mean, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return ""
    x, y = np.array(points, float).T
    low, high = y.min(), y.max()
    room = high - low or 1.0
    across = np.arange(2 * width) / (2 * width - 1) * total
    within = (across >= x[0]) & (across <= x[-1])
    columns = np.flatnonzero(within)
    rows = np.rint((high - np.interp(across[within], x, y)) / room * (4 * _HEIGHT - 1)).astype(int)
    cells = np.zeros((_HEIGHT, width), int)
    before = rows[0] if len(rows) else 0
    for column, row in zip(columns, rows, strict=True):  # down or up to the last one, so that no gap shows
        for between in range(min(row, before), max(row, before) + 1):
            cells[between // 4, column // 2] |= _DOTS[between % 4, column % 2]
        before = row
    lines = ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
    labels = [f"{high:,.4g}", *[""] * (_HEIGHT - 2), f"{low:,.4g}"]
    wide = max(map(len, labels))
    body = [f"{label:>{wide}} ┤{line}" for label, line in zip(labels, lines, strict=True)]
    end = f"{total:,} steps"
    foot = f"{'':>{wide}} └{'─' * width}\n{'':>{wide}}  0{end:>{width - 1}}"
    return "\n".join([f"{'':>{wide}}  {title}", *body, foot])


def smoothed(values: Sequence[float | int]) -> np.ndarray:
    """The mean of each value and the few before it, of those that are numbers; NaN before the first."""
    given = np.array(values, float)
    windows = [given[max(0, i + 1 - _WINDOW) : i + 1] for i in range(len(given))]
    return np.array([w[~np.isnan(w)].mean() if not np.isnan(w).all() else np.nan for w in windows])
