"""What a command says while it works: messages and progress, both on standard error."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
_SECONDS_BETWEEN_LINES = 15.0


def setup() -> None:
    """Show our own messages from INFO on, and other libraries' from WARNING on."""
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    handler.setFormatter(_LevelFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("core", "llm"):
        logging.getLogger(package).setLevel(logging.INFO)


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextlib.contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left; call `update(done, status)`. Without a terminal, a line now and then."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total, completed=done, status="")
            yield lambda done, status: bar.update(task, completed=done, status=status)
        return
    started, first, last = time.monotonic(), done, -_SECONDS_BETWEEN_LINES

    def update(done: int, status: str) -> None:
        nonlocal last
        now = time.monotonic() - started
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            left = now * (total - done) / max(1, done - first)
            console.print(f"{name} {done}/{total}  {status}  {left:.0f}s left", soft_wrap=True)

    yield update
