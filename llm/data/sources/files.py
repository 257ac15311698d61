"""Files as a source: laid end to end, and shard k what starts in the k-th `shard_bytes` of them.

So shards need no look into the files, whatever these hold: a part of a text file starts near a multiple of
its size, a line of JSON where it stands, a row group of Parquet at its first page, all of a compressed file
at the file's first byte.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from core.errors import UserError
from llm.data.sources.document import Broken, Document
from llm.data.sources.jsonl import compression, read_jsonl
from llm.data.sources.listing import File
from llm.data.sources.parquet import read_parquet
from llm.data.sources.text import LINE_BYTES, PART_BYTES, read_text, text_names


@dataclass(frozen=True)
class FileSource:
    """The files of one glob, in order."""

    files: tuple[File, ...]
    field: str | None  # None: `text`
    shard_bytes: int

    @property
    def num_shards(self) -> int:
        return -(-self._starts[-1] // self.shard_bytes)

    @property
    def num_bytes(self) -> int | None:
        """The sizes of all files: exact for text, and about right for plain JSON lines."""
        plain = all(self._kind(file) != "parquet" and not compression(file) for file in self.files)
        return self._starts[-1] if plain else None

    @cached_property
    def fingerprint(self) -> str:
        """Files count by path, size and time of modification; the embedded corpus by its content."""
        digest = hashlib.blake2b(f"{PART_BYTES} {LINE_BYTES} {self.field}".encode(), digest_size=8)
        for file in self.files:
            digest.update("\0".join((file.name, file.path, file.stamp, "")).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def documents(self, shard: int) -> Iterator[Document | Broken]:
        begin = shard * self.shard_bytes
        end = begin + self.shard_bytes
        first = max(bisect.bisect_right(self._starts, begin) - 1, 0)
        last = bisect.bisect_left(self._starts, end, hi=len(self.files))
        for file, start in zip(self.files[first:last], self._starts[first:last], strict=True):
            yield from self._read(file, begin - start, end - start)

    def names(self) -> Iterator[str] | None:
        if any(self._kind(file) != "text" for file in self.files):
            return None
        return itertools.chain.from_iterable(map(text_names, self.files))

    def _read(self, file: File, begin: int, end: int) -> Iterator[Document | Broken]:
        match self._kind(file):
            case "parquet":
                return read_parquet(file, begin, end, self.field or "text")
            case "jsonl":
                return read_jsonl(file, begin, end, self.field or "text")
        return read_text(file, begin, end)

    def _kind(self, file: File) -> Literal["text", "jsonl", "parquet"]:
        return file_kind(file, self.field)

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((file.size for file in self.files), initial=0))


def file_kind(file: File, field: str | None) -> Literal["text", "jsonl", "parquet"]:
    """What a file holds, by its suffix."""
    packed = compression(file)
    name = file.name.removesuffix(packed).lower()
    if name.endswith((".jsonl", ".ndjson")) or (name.endswith(".json") and (packed or field)):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def check_kind(file: File, field: str | None, key: str) -> None:
    """Raise a UserError for a file that no reader reads, or whose reader knows no fields."""
    kind, packed = file_kind(file, field), compression(file)
    if packed and kind != "jsonl":
        raise UserError(
            f"{key}: {file.path} is compressed: of compressed files only JSON lines are read "
            f"(.jsonl{packed}); Parquet has codecs of its own, and text is unpacked first"
        )
    if field and kind == "text":
        raise UserError(
            f"{key}: 'field' is given, but {file.path} is read as plain text: records are read from files "
            "that end in .jsonl, .ndjson, .json or .parquet"
        )
