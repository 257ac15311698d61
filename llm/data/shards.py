"""Token shards: documents as token ids on disk, with a table of what each document is.

Each source of a corpus has a folder of its own:

    KEY/index.json                         what is here; written last, so that it marks completeness
    KEY/00000/train/tokens.npy    uint16   (uint32 where the vocabulary needs it) BOS, text, EOS, ...
                    starts.npy    int64    where each document starts in it; one more: the number of tokens
                    bytes.npy     int32    each document's length in bytes of UTF-8
                    weights.npy   float32  what its tokens count in the loss: 1, or what you write there
                    sources.npy   int32    the place in the index's `sources` of the one it came from
                    names.jsonl            its name: one JSON string a line
              heldout/...                  the same
    KEY/00001/...

All arrays open with `numpy.load(path, mmap_mode="r")`. Shard k covers the documents of the source's shard k:
its content depends on source and tokenizer alone, and shards may be built in any order and at one time, on
several machines. A shard's folder gets its name when all in it is on disk: what has a name is finished, and
after a kill or on a full disk nothing of it is lost.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import sync_folder, write_atomically
from core.log import in_bytes, progress
from llm.data.corpus import SPLITS, Corpus, Member, Tally
from llm.data.sources.document import Document
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

FORMAT = 1
_BATCH_BYTES = 4 << 20  # of text at a time for the tokenizer, to spread over its threads
_HEADER_BYTES = 128  # of a one-dimensional .npy file, whatever its length

Advance = Callable[[int, int], None]  # told the documents and the bytes of text just tokenized


def build_shards(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, task: int = 0, tasks: int = 1
) -> tuple[Path, ...]:
    """Build the shards that are missing, under a progress bar, and return each member's `folder/KEY`.

    KEY is a fingerprint of source, split and tokenizer: when one of them changes, so does the folder. Of
    several tasks, each builds the shards whose number, over all members, is its own modulo `tasks`; the one
    that finds a member's shards finished writes the index.

    Raises:
        UserError: for what can't be read, too many broken records, or a tokenizer without an end of text.
    """
    folders = tuple(folder / shards_key(member, tokenizer) for member in corpus.members)
    places = dict(zip(corpus.members, folders, strict=True))
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
    share = corpus.shards[task::tasks]
    mine = [(member, k) for member, k in share if not shard_folder(places[member], k).exists()]
    if mine:
        _build(mine, places, tokenizer, corpus)
    built = {member for member, _ in mine}
    for member, place in places.items():
        if (member in built or not (place / "index.json").exists()) and not unfinished(member, place):
            _write_index(member, tokenizer, place)
    return folders


def _build(
    mine: Sequence[tuple[Member, int]], places: dict[Member, Path], tokenizer: Tokenizer, corpus: Corpus
) -> None:
    documents = done = 0
    tallies: dict[Member, Tally] = {}
    size = corpus.num_bytes
    size = None if size is None else size * len(mine) // len(corpus.shards)
    with progress("tokenizing", size, show=in_bytes) as update:

        def advance(more: int, size: int) -> None:
            nonlocal documents, done
            documents, done = documents + more, done + size
            update(done, f"{documents:,} documents")

        for member, number in mine:
            if not shard_folder(places[member], number).exists():  # by another process, meanwhile
                tally = build_shard(member, tokenizer, places[member], number, advance)
                tallies.setdefault(member, Tally()).add(tally)
    for member, tally in tallies.items():
        if tally.broken:
            _log.warning("%s: %s; they are left out", member.label, tally)


def unfinished(member: Member, folder: Path) -> list[int]:
    """The shards that are still to be built."""
    return [k for k in range(member.source.num_shards) if not shard_folder(folder, k).exists()]


def boundaries(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids before and after each document: BOS and EOS; EOS twice where the tokenizer has no BOS.

    Something must come first, for the first token of a document to be predicted like the others.

    Raises:
        UserError: for a tokenizer that has no EOS.
    """
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if eos is None:
        raise UserError(
            f"the tokenizer in {tokenizer.path} names no token that ends a text: "
            "set 'eos_token' in its tokenizer_config.json"
        )
    return (eos if bos is None else bos), eos


def shards_key(member: Member, tokenizer: Tokenizer) -> str:
    """16 hex digits for these documents, split this way, in these shards, as the ids of this tokenizer."""
    shards = (FORMAT, member.shard_bytes, member.source.num_shards)
    parts = (*shards, member.fingerprint, tokenizer.fingerprint, *boundaries(tokenizer))
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def shard_folder(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"{number:05d}"


def build_shard(
    member: Member,
    tokenizer: Tokenizer,
    folder: Path,
    number: int,
    advance: Advance = lambda documents, size: None,
) -> Tally:
    """Tokenize shard `number` into its folder, which appears whole or not at all. Returns what was read.

    Raises:
        UserError: for what can't be read, or too many broken records.
    """
    target = shard_folder(folder, number)
    temporary = folder / f".{target.name}-{uuid.uuid4().hex}"
    tally = Tally()
    try:
        tables = {split: _Table(temporary / split, tokenizer) for split in SPLITS}
        for batch in _batches(member.documents(number, tally)):
            ids = tokenizer.encode_batch([document.text for document in batch])
            sizes = [len(document.text.encode()) for document in batch]
            for split, table in tables.items():
                rows = zip(batch, ids, sizes, strict=True)
                table.append([row for row in rows if member.split_of(row[0].name) == split])
            advance(len(batch), sum(sizes))
        for table in tables.values():
            table.finish()
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(folder)
    except OSError as error:
        if not target.exists():  # else another process built the same shard at the same time, and was first
            error.filename = error.filename or str(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tally


class _Table:
    """One split of one shard, which goes to the disk batch by batch."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.first, self.last = boundaries(tokenizer)
        small = tokenizer.vocab_size <= 2**16
        self.dtypes = {
            "tokens": np.dtype(np.uint16 if small else np.uint32),
            "starts": np.dtype(np.int64),
            "bytes": np.dtype(np.int32),
            "weights": np.dtype(np.float32),
            "sources": np.dtype(np.int32),
        }
        self.tokens = self.documents = 0
        for name in self.dtypes:
            _write(folder / f"{name}.npy", bytes(_HEADER_BYTES), "wb")
        _write(folder / "starts.npy", bytes(8), "ab")
        _write(folder / "names.jsonl", b"", "wb")

    def append(self, rows: Sequence[tuple[Document, Sequence[int], int]]) -> None:
        """Add documents, each with its ids and its size."""
        if not rows:
            return
        tokens = itertools.chain.from_iterable((self.first, *ids, self.last) for _, ids, _ in rows)
        lengths = np.array([len(ids) + 2 for _, ids, _ in rows])
        columns = {
            "tokens": np.fromiter(tokens, self.dtypes["tokens"], lengths.sum()),
            "starts": self.tokens + np.cumsum(lengths),
            "bytes": np.array([size for _, _, size in rows]),
            "weights": np.ones(len(rows)),
            "sources": np.zeros(len(rows)),
        }
        for name, column in columns.items():
            _write(self.folder / f"{name}.npy", column.astype(self.dtypes[name]).tobytes(), "ab")
        names = "".join(json.dumps(document.name) + "\n" for document, _, _ in rows)
        _write(self.folder / "names.jsonl", names.encode(), "ab")
        self.tokens += int(lengths.sum())
        self.documents += len(rows)

    def finish(self) -> None:
        """Write the lengths, which are known only now, and wait for the disk."""
        lengths = {"tokens": self.tokens, "starts": self.documents + 1}
        for name, dtype in self.dtypes.items():
            header = _npy_header(dtype, lengths.get(name, self.documents))
            _write(self.folder / f"{name}.npy", header, "r+b", sync=True)
        _write(self.folder / "names.jsonl", b"", "ab", sync=True)
        sync_folder(self.folder)


def _write(path: Path, content: bytes, mode: str, sync: bool = False) -> None:
    with open(path, mode) as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_index(member: Member, tokenizer: Tokenizer, folder: Path) -> None:
    for leftover in folder.glob(".*-*"):  # of builds that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    index = {
        "format": FORMAT,
        "sources": [member.label],
        "documents": member.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "boundaries": boundaries(tokenizer),
        "shards": [
            {split: _counts(shard_folder(folder, number) / split) for split in SPLITS}
            for number in range(member.source.num_shards)
        ],
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _counts(folder: Path) -> dict[str, int]:
    sizes = np.load(folder / "bytes.npy")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return {"documents": len(sizes), "tokens": len(tokens), "bytes": int(sizes.sum(dtype=np.int64))}
