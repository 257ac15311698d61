"""Text files, found by glob and read a few megabytes at a time."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator, Sequence

from core.errors import UserError
from llm.tokenizer.patterns import cut_before

BLOCK = 1 << 22  # bytes read at a time


def find_files(patterns: Sequence[str]) -> list[str]:
    """The files that the globs name (`**` for any folders between), sorted, each once.

    Raises:
        UserError: for a glob that names no file, or only empty ones.
    """
    found: set[str] = set()
    for pattern in patterns:
        # A name that exists means itself, whatever characters are in it.
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [name for name in names if os.path.isfile(name)]
        if os.path.isdir(pattern):
            raise UserError(
                f"{pattern} is a folder: name its files, such as '{pattern.rstrip('/')}/**/*.txt'"
            )
        if not files:
            raise UserError(f"no file matches {pattern!r} (looked for from {os.getcwd()})")
        if not any(map(os.path.getsize, files)):
            raise UserError(f"{pattern!r} names nothing but empty files: name files that hold text")
        found.update(files)
    return sorted(found)


def read_text(path: str) -> Iterator[str]:
    """The text of a UTF-8 file in parts, cut where no split pattern would notice.

    Raises:
        UserError: for a file that can't be read or isn't UTF-8, with the offset of the first bad byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset = "", 0
    try:
        with open(path, "rb") as file:
            while data := file.read(BLOCK):
                text += _decode(decoder, data, offset, path)
                offset += len(data)
                cut = cut_before(text, len(text))
                if cut:
                    yield text[:cut]
                text = text[cut:]
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    text += _decode(decoder, b"", offset, path)
    if text:
        yield text


def decode_utf8(data: bytes, name: str) -> str:
    """`data` as text; a `UserError` with `name` and the offset of the first bad byte if it isn't UTF-8."""
    return _decode(codecs.getincrementaldecoder("utf-8")(), data, 0, name, final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, data: bytes, offset: int, name: str, final: bool | None = None
) -> str:
    held_back = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
    try:
        return decoder.decode(data, final=not data if final is None else final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {offset - held_back + error.start} "
            f"(0x{error.object[error.start]:02x}): convert it, for example with 'iconv -f latin1 -t utf-8', "
            "or leave it out"
        ) from None
