"""Files: those that a glob names, and what is known of one before it is read."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from typing import NamedTuple

from core.errors import UserError
from llm.data.sources.embedded import embedded_bytes, embedded_names

SMALLEST_BYTES = 16  # a smaller file is more boundary than text: dropped


class File(NamedTuple):
    """`stamp` differs whenever the content may. A name never depends on where its corpus lies."""

    name: str
    path: str  # empty for the embedded corpus
    size: int  # bytes
    stamp: str
    identity: object  # the same for two names of one file


def list_files(pattern: str, key: str) -> list[File]:
    """The files of the embedded corpus or of a glob, sorted by path; `key` is what the user wrote it under.

    Raises:
        UserError: if no file matches, or only empty ones.
    """
    files = _list_embedded() if pattern == "embedded" else _list_glob(pattern, key)
    if all(file.size < SMALLEST_BYTES for file in files):
        raise UserError(f"{key}: {pattern!r} names nothing but empty files; name files that hold text")
    return files


def _list_embedded() -> list[File]:
    contents = [(name, embedded_bytes(name)) for name in embedded_names()]
    return [File(name, "", len(text), _digest(text), name) for name, text in contents]


def _list_glob(source: str, key: str) -> list[File]:
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise UserError(
            f"{key}: {source!r} is a folder; name its files, such as '{source.rstrip('/')}/**/*.txt'"
        )
    folder, is_file = os.path.dirname(pattern), os.path.isfile(pattern)
    while glob.has_magic(folder) and not is_file:
        folder = os.path.dirname(folder)
    paths = [pattern] if is_file else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not paths:
        raise UserError(f"{key}: no file matches {source!r} (from the folder {os.path.abspath(folder)})")
    files = []
    for path in paths:
        status = os.stat(path)
        name = os.path.relpath(path, folder or ".").replace(os.sep, "/")
        identity = (status.st_dev, status.st_ino)
        files.append(File(name, os.path.abspath(path), status.st_size, stamp(status), identity))
    return files


def open_file(file: File) -> io.BufferedReader:
    """Open a file that is still as it was when it was listed.

    Raises:
        UserError: for one that is gone, unreadable, or changed.
    """
    try:
        opened = open(file.path, "rb")  # noqa: SIM115
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{file.path} can't be read: {error.strerror}") from None
    if stamp(os.fstat(opened.fileno())) != file.stamp:
        opened.close()
        raise UserError(f"{file.path} changed while it was in use: run the same command again")
    return opened


def stamp(status: os.stat_result) -> str:
    """Size and time of modification: cheap to ask, and different when the content is."""
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
