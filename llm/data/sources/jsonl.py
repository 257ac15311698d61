"""JSON lines: a line is one document, `name#LINE`, counted from 1 as editors do.

A plain file can be read from any byte on; a compressed one only from its start, as a stream.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from core.errors import UserError
from llm.data.sources.document import Broken, Document, from_record, import_extra
from llm.data.sources.listing import File, open_file

LONGEST_LINE = 256 << 20  # bytes; more is not a line but a file that isn't JSON lines
_BLOCK = 16 << 20  # bytes whose line ends are counted, and remembered, together


def read_jsonl(file: File, begin: int, end: int, field: str) -> Iterator[Document | Broken]:
    """The lines that start at bytes `begin` to `end` of a file; all of a compressed one with its first byte.

    Raises:
        UserError: for a file that is gone, changed, compressed and damaged, or not of lines.
    """
    suffix = compression(file)
    if suffix and not begin <= 0 < end:
        return
    with open_file(file) as opened:
        if suffix:
            stream, number, left = _DECOMPRESS[suffix](opened), 1, None
        else:
            stream, number, left = opened, *_seek_line(file, opened, begin, end)
        for line in _lines(file, stream, left):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(file, number, line, field)
            number += 1


def compression(file: File) -> str:
    """The suffix that says how a file is compressed; empty for a plain one."""
    return next((suffix for suffix in _DECOMPRESS if file.name.endswith(suffix)), "")


def _open_zstd(opened: io.BufferedReader) -> io.BufferedReader:
    pyarrow = import_extra("pyarrow")
    return io.BufferedReader(pyarrow.CompressedInputStream(opened, "zstd"), 1 << 20)


_DECOMPRESS: dict[str, Callable[[io.BufferedReader], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _seek_line(file: File, opened: io.BufferedReader, begin: int, end: int) -> tuple[int, int]:
    """Go to the first line that starts at `begin` or after it: its number, and the bytes from it to `end`."""
    if begin <= 0:
        return 1, end
    blocks, rest = divmod(begin - 1, _BLOCK)
    before = sum(_count_lines(file, block) for block in range(blocks))
    opened.seek(blocks * _BLOCK)
    before += opened.read(rest).count(b"\n")
    skipped = opened.readline(LONGEST_LINE)  # the line that the byte before `begin` belongs to
    return before + 2, end - (begin - 1) - len(skipped)


@functools.lru_cache(maxsize=1 << 20)
def _count_lines(file: File, block: int) -> int:
    with open_file(file) as opened:
        opened.seek(block * _BLOCK)
        return opened.read(_BLOCK).count(b"\n")


def _lines(file: File, stream: io.BufferedIOBase, left: int | None) -> Iterator[bytes]:
    """The lines that start in the next `left` bytes; None: all."""
    count = 0
    while left is None or left > 0:
        try:
            line = stream.readline(LONGEST_LINE)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{file.path} is damaged or cut short ({error}), {count:,} lines from its start: copy it "
                "again, or leave it out of data.sources"
            ) from None
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"{file.path} has a line of more than {LONGEST_LINE >> 20} MiB: JSON lines hold one record a "
                "line, as `jq -c '.[]'` writes them from an array"
            )
        count += 1
        left = None if left is None else left - len(line)
        yield line


def _parse(file: File, number: int, line: bytes, field: str) -> Document | Broken:
    place = f"{file.path}, line {number}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken(place, f"not UTF-8 at byte {error.start} (0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return Broken(place, f"not JSON: {error}")
    return from_record(record, field, f"{file.name}#{number}", place)
