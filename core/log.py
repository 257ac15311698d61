"""What a command says while it works: messages and progress, both on standard error."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich import filesize
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
_SECONDS_BETWEEN_LINES = 15.0
_quiet = False


def setup(*packages: str) -> None:
    """Show messages of `core` and `packages` from INFO on, and other libraries' from WARNING on.

    In a file each is one line, so that it can be searched for, paths and all.
    """
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    handler.setFormatter(_LevelFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("core", *packages):
        logging.getLogger(package).setLevel(logging.INFO)


def only_warnings(name: str) -> None:
    """Show warnings alone from here on, each after `name`: of many processes with one task, one speaks."""
    global _quiet
    _quiet = True
    root = logging.getLogger()
    for handler in root.handlers:
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_LevelFormatter(f"{name}: %(message)s"))


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextlib.contextmanager
def progress(
    name: str, total: int | None, done: int = 0, show: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[..., None]]:
    """A bar with the time left; call `update(done, status="")`. Without a terminal, a line now and then.

    Args:
        total: None where it is not known.
        show: how an amount is written, for example `in_bytes`.
    """
    if _quiet:
        yield lambda done, status="": None
        return
    of_total = "" if total is None else f"/{show(total)}"
    if console.is_terminal:
        columns = ("{task.description}", BarColumn(), "{task.fields[status]}", TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total, completed=done, status="")

            def move(done: int, status: str = "") -> None:
                bar.update(task, completed=done, status=f"{show(done)}{of_total}  {status}")

            yield move
        return
    started, first, last = time.monotonic(), done, -_SECONDS_BETWEEN_LINES

    def update(done: int, status: str = "") -> None:
        nonlocal last
        now = time.monotonic() - started
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            left = "" if total is None else f"  {now * (total - done) / max(1, done - first):.0f}s left"
            console.print(f"{name} {show(done)}{of_total}  {status}{left}", soft_wrap=True)

    yield update


in_bytes = filesize.decimal
