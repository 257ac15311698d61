"""Text files: a file is one document, a large one several.

A file over 256 KiB is cut at line ends into documents `name#0`, `name#1`, ...: where a part begins depends
only on the bytes around a multiple of `PART_BYTES`, so any part can be read without the ones before it, and
appending to a file changes its last part alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from core.errors import UserError
from llm.data.sources.document import Document
from llm.data.sources.embedded import embedded_bytes
from llm.data.sources.listing import File, open_file

PART_BYTES = 128 << 10  # files of more than twice this are cut near its multiples
LINE_BYTES = PART_BYTES // 4  # how far from there the end of a line is looked for, before one is split


def read_text(file: File, begin: int, end: int) -> Iterator[Document]:
    """The documents that start at bytes `begin` to `end` of a file, by the multiples they are cut near."""
    first = max(0, -(-begin // PART_BYTES))
    last = min(_num_parts(file), -(-end // PART_BYTES))
    return (Document(_part_name(file, part), _read_part(file, part)) for part in range(first, last))


def text_names(file: File) -> Iterator[str]:
    """The names of all its documents."""
    return (_part_name(file, part) for part in range(_num_parts(file)))


def _part_name(file: File, part: int) -> str:
    return file.name if _num_parts(file) == 1 else f"{file.name}#{part}"


def _num_parts(file: File) -> int:
    return max(1, (file.size - 1) // PART_BYTES)  # the last part is the longest: no tail of a few bytes


def _read_part(file: File, part: int) -> str:
    """The text between the cuts near `part * PART_BYTES` and the next multiple."""
    last = part == _num_parts(file) - 1
    start = part * PART_BYTES
    data = _read(file, start, file.size if last else start + PART_BYTES + LINE_BYTES)
    begin = _cut(data, 0) if part else 0
    end = len(data) if last else _cut(data, PART_BYTES)
    try:
        return data[begin:end].decode().removeprefix("\ufeff" if part == 0 else "")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 at byte {start + begin + error.start} "
            f"(0x{data[begin + error.start]:02x}): convert it, for example with "
            "'iconv -f latin1 -t utf-8', or leave it out of data.sources"
        ) from None


def _cut(data: bytes, at: int) -> int:
    """The first line that starts after `at`; none within `LINE_BYTES`: the first character from `at` on."""
    newline = data.find(b"\n", at, at + LINE_BYTES)
    if newline >= 0:
        return newline + 1
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


def _read(file: File, start: int, stop: int) -> bytes:
    if not file.path:
        return embedded_bytes(file.name)[start:stop]
    with open_file(file) as opened:
        opened.seek(start)
        return opened.read(stop - start)
