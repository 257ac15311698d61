"""The model of a folder, served in this process for the page, which talks to it as to any other server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from core import devices, log
from launch.chat.client import Server
from launch.chat.inside import Inside


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[Inside, str]]:
    """The model, and the mode that suits it: "complete" where no chat template came with its tokenizer.

    Raises:
        UserError: where the folder is neither a run nor an export, or FastAPI is missing.
    """
    log.setup("llm", "launch")
    devices.prepare()
    from launch.server import running
    from launch.server.model import Served

    served = Served.of(folder)
    with running(served) as (url, _):
        model = Inside(Server.of(url).url, served.config, served.params, served.tokenizer, served.dtype)
        yield model, "complete" if served.tokenizer.chat_template is None else "chat"
