"""A folder that stands whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sync_folder, write_atomically


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when all is in it and on the disk.

    Whatever ends the filling before that leaves nothing by that name; after a kill a hidden folder remains
    beside it, which the next try removes.

    Raises:
        UserError: if something has that name already, or the folder can't be made.
    """
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already: name another folder with --out, or remove that one")
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{unfinished} can't be made: {error.strerror}; name another place with --out"
        ) from None
    try:
        yield unfinished
        sync_folder(unfinished)
        os.rename(unfinished, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
