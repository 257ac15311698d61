"""The model of a folder, served in this process for the page, which talks to it as to any other server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core import devices, log
from launch.chat.client import Server
from launch.chat.inside import Inside
from llm.chat import TEMPLATE

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import Tokenizer


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[Inside, str]]:
    """The model, and the mode that suits it: "chat" or "complete".

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
        yield model, first_mode(served.tokenizer)


def first_mode(tokenizer: Tokenizer) -> str:
    """ "chat" for a model of others that came with a template of its own, else "complete".

    Our exports all have our template, so it tells nothing. No run says yet whether its model was tuned to
    conversations; one that does is to be asked here.
    """
    template = tokenizer.chat_template
    return "complete" if template is None or template.strip() == TEMPLATE.strip() else "chat"
