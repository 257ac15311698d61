"""The documents of an experiment: their sources, and which of them are held out.

A document is held out by a hash of its own name, so that the split depends on nothing else. Names tell
where in its source a document stands, never where the source lies: moving a corpus moves no document from
one split to the other. Parts of one file hash apart: otherwise a corpus of a few large files would hold out
nothing or nearly everything. They share no text, but they may share an author or a subject; where that
matters, `data.heldout` names sources of their own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from core.errors import UserError
from llm.data.config import Source
from llm.data.sources.document import Broken, Document, Documents
from llm.data.sources.files import FileSource, check_kind
from llm.data.sources.huggingface import open_huggingface
from llm.data.sources.listing import SMALLEST_BYTES, list_files
from llm.data.sources.tfds import open_tfds

_log = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

SHARD_BYTES = 64 << 20
_HOPELESS = 1000  # records that are all broken: the format is mistaken, and the rest is not read


@dataclass
class Tally:
    """How many documents were looked for in a stretch of a source, and how many of them were broken."""

    records: int = 0
    broken: int = 0
    first: Broken | None = None

    def add(self, other: Tally) -> None:
        self.records += other.records
        self.broken += other.broken
        self.first = self.first or other.first

    def __str__(self) -> str:
        assert self.first is not None
        return (
            f"{self.broken:,} of {self.records:,} records are broken, the first in {self.first.place}: "
            f"{self.first.reason}"
        )


@dataclass(frozen=True, eq=False)
class Member:
    """A source of a corpus, and the rule that splits its documents."""

    label: str
    weight: float | None  # the share of training tokens; None: what it holds
    source: Documents
    split: Split | None  # None: the names of its documents decide
    threshold: int  # documents whose `name_hash` is below it are held out
    broken_fraction: float
    shard_bytes: int  # that its shards are meant to have

    def documents(self, shard: int, tally: Tally | None = None) -> Iterator[Document]:
        """Read a shard's documents, of both splits. Those that are broken or empty are left out.

        Args:
            tally: is added what was read.

        Raises:
            UserError: for what can't be read at all, or more than `broken_fraction` of broken ones.
        """
        tally = Tally() if tally is None else tally
        for item in self.source.documents(shard):
            tally.records += 1
            if isinstance(item, Broken):
                tally.broken += 1
                tally.first = tally.first or item
                if tally.records == tally.broken == _HOPELESS:
                    break
            elif item.text:
                yield item
        if tally.broken > self.broken_fraction * tally.records:
            raise UserError(
                f"{self.label}: {tally}. That is more than data.broken_fraction ({self.broken_fraction:g}) "
                "of them: mend the source, or raise that"
            )

    def split_of(self, name: str) -> Split:
        """Where the document of that name belongs."""
        return self.split or ("heldout" if name_hash(name) < self.threshold else "train")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the documents and with their split, not with the weight."""
        parts = (self.source.fingerprint, self.split, self.threshold)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """All sources, those of `data.heldout` last. Whatever a shard holds is in one of them."""

    members: tuple[Member, ...]

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        """Read all documents one after the other, of one split or of both, always in the same order."""
        for member, shard in self.shards:
            for document in member.documents(shard):
                if split in (None, member.split_of(document.name)):
                    yield document

    @cached_property
    def shards(self) -> tuple[tuple[Member, int], ...]:
        """The shards of all members."""
        return tuple((member, k) for member in self.members for k in range(member.source.num_shards))

    @property
    def num_bytes(self) -> int | None:
        """About how much text it is; None where a source can't tell."""
        sizes = [member.source.num_bytes for member in self.members]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the documents and with their split."""
        parts = [member.fingerprint for member in self.members]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def open_corpus(
    sources: Sequence[Source | str],
    heldout: Sequence[Source | str] | None = None,
    heldout_fraction: float = 0.05,
    broken_fraction: float = 0.001,
    shard_bytes: int = SHARD_BYTES,
) -> Corpus:
    """Open the `sources`, and those of `heldout` where the held-out split has sources of its own.

    Without `heldout`, about `heldout_fraction` of the documents is held out: of text files, whose names
    are known, at least one and never all. With it, what both name is held out. What two sources name is
    read once, for the first.

    Raises:
        UserError: for a source that can't be opened or is empty, or fewer than two documents to split.
    """
    seen: set[object] = set()
    held = _open_all(heldout or (), "data.heldout", seen, shard_bytes)
    train = _open_all(sources, "data.sources", seen, shard_bytes)
    if not train:
        raise UserError("data.heldout names every file of data.sources: none is left to train on")
    threshold = 0 if held else _threshold([opened for _, opened in train], heldout_fraction)
    groups: tuple[tuple[Split | None, list], ...] = (("train" if held else None, train), ("heldout", held))
    members = [
        Member(source.label, source.weight, opened, split, threshold, broken_fraction, shard_bytes)
        for split, group in groups
        for source, opened in group
    ]
    return Corpus(tuple(members))


def name_hash(name: str) -> int:
    """A number below 2**64, evenly spread over names, the same on every machine."""
    encoded = name.encode("utf-8", "surrogateescape")  # the name of a file may be any bytes
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _threshold(sources: Iterable[Documents], fraction: float) -> int:
    """The hash below which names are held out: `fraction` of all hashes.

    Where all names are known, it is moved so that no split is empty.
    """
    wanted = int(fraction * 2**64)
    lowest, highest, last = 2**64, -1, ""
    for source in sources:
        names = source.names()
        if names is None:
            return wanted
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


def _open_all(
    entries: Sequence[Source | str], key: str, seen: set[object], shard_bytes: int
) -> list[tuple[Source, Documents]]:
    """Each entry that holds something `seen` does not, which it is added to."""
    opened = []
    for number, entry in enumerate(entries):
        source = Source(path=entry) if isinstance(entry, str) else entry
        documents = _open(source, f"{key}.{number}", seen, shard_bytes)
        if documents is not None:
            opened.append((source, documents))
        elif source.weight is not None:
            raise UserError(f"{key}.{number}: all of {source.label!r} is named before: it can have no weight")
    return opened


def _open(source: Source, key: str, seen: set[object], shard_bytes: int) -> Documents | None:
    documents: Documents
    if source.path is not None:
        documents = _open_files(source.path, source.field, key, seen, shard_bytes)
        return documents if documents.files else None
    if source.huggingface is not None:
        documents = open_huggingface(source, key)
    else:
        documents = open_tfds(source, key, shard_bytes)
    if documents.fingerprint in seen:
        return None
    seen.add(documents.fingerprint)
    return documents


def _open_files(path: str, field: str | None, key: str, seen: set[object], shard_bytes: int) -> FileSource:
    listed = list_files(path, key)
    kept = []
    for file in listed:
        if file.size >= SMALLEST_BYTES and file.identity not in seen:
            check_kind(file, field, key)
            seen.add(file.identity)
            kept.append(file)
    dropped = sum(file.size < SMALLEST_BYTES for file in listed if file.path)  # of Python's, no news
    if dropped:
        _log.info("%d of %d files have less than %d bytes: left out", dropped, len(listed), SMALLEST_BYTES)
    return FileSource(tuple(kept), field, shard_bytes)
