"""Documents: what is read, in which order, under which names, and which of them are held out.

A source is `embedded` (text that comes with every Python) or a glob of UTF-8 text or code files. A file is
one document, named by its path relative to the fixed folder of its glob, so that moving a corpus moves no
document from one split to the other. A file over 256 KiB is cut at line ends into documents `name#0`,
`name#1`, ...: where a part begins depends only on the bytes around a multiple of `PART_BYTES`, so any part
can be read without the ones before it, and appending to a file changes its last part alone.

A document is held out by a hash of its own name. Parts of one file hash apart: otherwise a corpus of a few
large files would hold out nothing or nearly everything. They share no text, but they may share an author or
a subject; where that matters, `data.heldout` names files of their own.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from core.errors import UserError
from llm.data.embedded import embedded_bytes, embedded_names

_log = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

PART_BYTES = 128 << 10  # files of more than twice this are cut near its multiples
LINE_BYTES = PART_BYTES // 4  # how far from there the end of a line is looked for, before one is split
SMALLEST_BYTES = 16  # a smaller file is more boundary than text: dropped


class Document(NamedTuple):
    """A piece of text that no attention crosses. `source` counts `Corpus.sources`."""

    name: str
    text: str
    split: Split
    source: int


class File(NamedTuple):
    """What is known of a file before it is read. `stamp` differs whenever its content may."""

    name: str
    path: str  # empty for the embedded corpus
    size: int  # bytes of UTF-8
    stamp: str
    source: int
    split: Split | None  # None: the names of its documents decide


@dataclass(frozen=True)
class Corpus:
    """All files of the sources, in order, and the rule that splits their documents."""

    sources: tuple[str, ...]
    files: tuple[File, ...]
    threshold: int  # documents whose `name_hash` is below it are held out

    def documents(
        self, split: Split | None = None, begin: int = 0, end: int | None = None
    ) -> Iterator[Document]:
        """Read documents one after the other, of one split or of both, always in the same order.

        `begin` and `end` bound where a document starts, in bytes of all files laid end to end: disjoint
        ranges give disjoint documents, and nothing outside a range is read.

        Raises:
            UserError: for a file that is gone, unreadable, changed since it was listed, or not UTF-8.
        """
        end = self.num_bytes if end is None else end
        first = max(bisect.bisect_right(self._starts, begin) - 1, 0)
        last = bisect.bisect_left(self._starts, end, hi=len(self.files))
        for file, start in ((self.files[i], self._starts[i]) for i in range(first, last)):
            for part, name in enumerate(_document_names(file)):
                if begin <= start + part * PART_BYTES < end:
                    its_split = file.split or ("heldout" if name_hash(name) < self.threshold else "train")
                    if split in (None, its_split):
                        yield Document(name, _read_part(file, part), its_split, file.source)

    @property
    def num_bytes(self) -> int:
        """The sizes of all files, added up."""
        return self._starts[-1]

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((file.size for file in self.files), initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the files and with the split.

        Files count by path, size and time of modification, which is cheap to ask; the embedded corpus by
        its content, so that it is the same on every machine with the same Python.
        """
        digest = hashlib.blake2b(f"{PART_BYTES} {LINE_BYTES} {self.threshold}".encode(), digest_size=8)
        for file in self.files:
            digest.update(_encode_name("\0".join((file.name, file.path, file.stamp, str(file.split), ""))))
        return digest.hexdigest()


def open_corpus(
    sources: Sequence[str], heldout: Sequence[str] | None = None, heldout_fraction: float = 0.05
) -> Corpus:
    """List the files of `sources`, and of `heldout` where the held-out split has sources of its own.

    Without `heldout`, about `heldout_fraction` of the documents is held out: at least one, never all. With
    it, a file that both name is held out. A file that two sources name is read once.

    Raises:
        UserError: for a source without files or with empty ones only, or fewer than two documents to split.
    """
    seen: set[object] = set()
    held = _list_sources(heldout or (), "data.heldout", len(sources), "heldout", seen)
    files = _list_sources(sources, "data.sources", 0, "train" if held else None, seen)
    kept = tuple(file for file in (*files, *held) if file.size >= SMALLEST_BYTES)
    if held and kept[0].split == "heldout":
        raise UserError("data.heldout names every file of data.sources: none is left to train on")
    names = (name for file in kept for name in _document_names(file))
    threshold = 0 if held else _threshold(names, heldout_fraction)
    listed = [file for file in (*files, *held) if file.path]  # empty modules of Python's are no news
    dropped = sum(file.size < SMALLEST_BYTES for file in listed)
    if dropped:
        _log.info("%d of %d files have less than %d bytes: left out", dropped, len(listed), SMALLEST_BYTES)
    return Corpus((*sources, *(heldout or ())), kept, threshold)


def name_hash(name: str) -> int:
    """A number below 2**64, evenly spread over names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(_encode_name(name), digest_size=8).digest(), "little")


def _encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # the name of a file may be any bytes


def _threshold(names: Iterable[str], fraction: float) -> int:
    """The hash below which names are held out: `fraction` of all hashes, moved so that no split is empty."""
    wanted = int(fraction * 2**64)
    lowest, highest, last = 2**64, -1, ""
    for name in names:
        value, last = name_hash(name), name
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < wanted <= highest:
            return wanted
    if lowest >= highest:
        raise UserError(
            f"data.sources hold only one document ({last}), and some must be held out: "
            "name files of their own in data.heldout"
        )
    return min(max(wanted, lowest + 1), highest)


def _list_sources(
    sources: Sequence[str], key: str, first: int, split: Split | None, seen: set[object]
) -> list[File]:
    files = []
    for number, source in enumerate(sources, first):
        found = _list_embedded() if source == "embedded" else _list_glob(source, key)
        if all(file.size < SMALLEST_BYTES for _, file in found):
            raise UserError(f"{key}: {source!r} names nothing but empty files; name files that hold text")
        for identity, file in found:
            if identity not in seen:
                seen.add(identity)
                files.append(file._replace(source=number, split=split))
    return files


def _list_embedded() -> list[tuple[object, File]]:
    contents = [(name, embedded_bytes(name)) for name in embedded_names()]
    return [(name, File(name, "", len(text), _digest(text), 0, None)) for name, text in contents]


def _list_glob(source: str, key: str) -> list[tuple[object, File]]:
    """The files that a glob names, sorted by path, each after what identifies it on its device."""
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
    files: list[tuple[object, File]] = []
    for path in paths:
        status = os.stat(path)
        name = os.path.relpath(path, folder or ".").replace(os.sep, "/")
        file = File(name, os.path.abspath(path), status.st_size, _stamp(status), 0, None)
        files.append(((status.st_dev, status.st_ino), file))
    return files


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _document_names(file: File) -> Iterator[str]:
    parts = _num_parts(file)
    return iter((file.name,)) if parts == 1 else (f"{file.name}#{part}" for part in range(parts))


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
    try:
        with open(file.path, "rb") as opened:
            if _stamp(os.fstat(opened.fileno())) != file.stamp:
                raise UserError(f"{file.path} changed while it was in use: run the same command again")
            opened.seek(start)
            return opened.read(stop - start)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{file.path} can't be read: {error.strerror}") from None
