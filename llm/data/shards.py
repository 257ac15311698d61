"""Token shards: documents as token ids on disk, with a table of what each document is.

    KEY/index.json                         what is here; written last, so that it marks completeness
    KEY/00000/train/tokens.npy    uint16   (uint32 where the vocabulary needs it) BOS, text, EOS, ...
                    starts.npy    int64    where each document starts in it; one more: the number of tokens
                    bytes.npy     int32    each document's length in bytes of UTF-8
                    weights.npy   float32  what its tokens count in the loss: 1, or what you write there
                    sources.npy   int32    the place in the index's `sources` of the one it came from
                    names.jsonl            its name: one JSON string a line
              heldout/...                  the same
    KEY/00001/...

All arrays open with `numpy.load(path, mmap_mode="r")`. Shard k covers the documents that start in the k-th
`shard_bytes` of the corpus: its content depends on corpus and tokenizer alone, and shards may be built in
any order and at one time, on several machines. A shard's folder gets its name when all in it is on disk:
what has a name is finished, and after a kill or on a full disk nothing of it is lost.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import sync_folder, write_atomically
from core.log import in_bytes, progress
from llm.data.corpus import SPLITS, Corpus, Document
from llm.tokenizer import Tokenizer

FORMAT = 1
SHARD_BYTES = 64 << 20
_BATCH_BYTES = 4 << 20  # of text at a time for the tokenizer, to spread over its threads

Advance = Callable[[int, int], None]  # told the documents and the bytes of text just tokenized


def build_shards(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Build the shards that are missing in `folder/KEY`, under a progress bar, and return that folder.

    KEY is a fingerprint of corpus, split and tokenizer: when one of them changes, so does the folder.

    Raises:
        UserError: for a file that is gone, unreadable, changed since it was listed, or not UTF-8; for a
            tokenizer without an end of text.
    """
    folder = folder / shards_key(corpus, tokenizer, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(num_shards(corpus, shard_bytes)) if not shard_folder(folder, k).exists()]
    if missing:
        documents = done = 0
        size = min(corpus.num_bytes, len(missing) * shard_bytes)
        with progress("tokenizing", size, show=in_bytes) as update:

            def advance(more: int, size: int) -> None:
                nonlocal documents, done
                documents, done = documents + more, done + size
                update(done, f"{documents:,} documents")

            for number in missing:
                build_shard(corpus, tokenizer, folder, number, shard_bytes, advance)
    if missing or not (folder / "index.json").exists():
        _write_index(corpus, tokenizer, folder, num_shards(corpus, shard_bytes))
    return folder


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


def shards_key(corpus: Corpus, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> str:
    """16 hex digits for these documents, split this way, as the ids of this tokenizer."""
    parts = (FORMAT, shard_bytes, corpus.fingerprint, tokenizer.fingerprint, *boundaries(tokenizer))
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def num_shards(corpus: Corpus, shard_bytes: int = SHARD_BYTES) -> int:
    """How many shards the corpus makes."""
    return -(-corpus.num_bytes // shard_bytes)


def shard_folder(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"{number:05d}"


def build_shard(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    number: int,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda documents, size: None,
) -> None:
    """Tokenize shard `number` into its folder, which appears whole or not at all.

    Raises:
        UserError: for a file that is gone, unreadable, changed since it was listed, or not UTF-8.
    """
    target = shard_folder(folder, number)
    temporary = folder / f".{target.name}-{uuid.uuid4().hex}"
    try:
        tables = {split: _Table(tokenizer) for split in SPLITS}
        documents = corpus.documents(begin=number * shard_bytes, end=(number + 1) * shard_bytes)
        for batch in _batches(documents):
            ids = tokenizer.encode_batch([document.text for document in batch])
            sizes = [len(document.text.encode()) for document in batch]
            for document, its_ids, size in zip(batch, ids, sizes, strict=True):
                tables[document.split].add(document, its_ids, size)
            advance(len(batch), sum(sizes))
        for split, table in tables.items():
            table.write(temporary / split)
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(folder)
    except OSError as error:
        if target.exists():
            return  # another process built the same shard at the same time, and was first
        error.filename = error.filename or str(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Table:
    """One split of one shard, in memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.first, self.last = boundaries(tokenizer)
        self.tokens: list[NDArray] = []
        self.rows: list[tuple[int, int, int]] = []
        self.names: list[str] = []

    def add(self, document: Document, ids: Sequence[int], size: int) -> None:
        all_ids = itertools.chain((self.first,), ids, (self.last,))
        self.tokens.append(np.fromiter(all_ids, self.dtype, len(ids) + 2))
        self.rows.append((len(ids) + 2, size, document.source))
        self.names.append(json.dumps(document.name) + "\n")

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        lengths, sizes, sources = np.array(self.rows, np.int64).reshape(-1, 3).T
        columns = {
            "tokens": np.concatenate([np.empty(0, self.dtype), *self.tokens]),
            "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "bytes": sizes.astype(np.int32),
            "weights": np.ones(len(sizes), np.float32),
            "sources": sources.astype(np.int32),
        }
        for name, column in columns.items():
            write_atomically(folder / f"{name}.npy", _npy(column))
        write_atomically(folder / "names.jsonl", "".join(self.names))


def _npy(array: NDArray) -> bytes:
    # numpy.save to a file reports a full disk as an error without a number; a plain write has one.
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
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


def _write_index(corpus: Corpus, tokenizer: Tokenizer, folder: Path, shards: int) -> None:
    for leftover in folder.glob(".*-*"):  # of builds that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    index = {
        "format": FORMAT,
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "sources": corpus.sources,
        "vocab_size": tokenizer.vocab_size,
        "boundaries": boundaries(tokenizer),
        "shards": [
            {split: _counts(shard_folder(folder, number) / split) for split in SPLITS}
            for number in range(shards)
        ],
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _counts(folder: Path) -> dict[str, int]:
    sizes = np.load(folder / "bytes.npy")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return {"documents": len(sizes), "tokens": len(tokens), "bytes": int(sizes.sum(dtype=np.int64))}
