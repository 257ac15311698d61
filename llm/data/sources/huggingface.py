"""Hugging Face data sets, streamed: from the hub, or from a folder laid out as one.

A shard is one of the data set's own (a file, as a rule), a document `NAME#SHARD-INDEX`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from llm.data.config import Source
from llm.data.sources.document import Broken, Document, from_record, import_extra


@dataclass(frozen=True)
class HuggingFaceSource:
    """One split of a data set. `open_huggingface` makes it."""

    name: str
    field: str
    fingerprint: str
    num_bytes: int | None
    dataset: Any  # datasets.IterableDataset

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards

    def documents(self, shard: int) -> Iterator[Document | Broken]:
        rows = iter(self.dataset.shard(num_shards=self.num_shards, index=shard))
        index = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of decompression, of parsing, of the connection: no common base
                raise UserError(
                    f"huggingface:{self.name} can't be read after record {index:,} of its shard {shard} "
                    f"({_first_line(error)}): run the same command again, which keeps the shards that are "
                    "finished; if it fails at the same place, the data set is damaged"
                ) from None
            place = f"huggingface:{self.name}, record {index} of shard {shard}"
            yield from_record(row, self.field, f"{self.name}#{shard}-{index}", place)
            index += 1

    def names(self) -> None:
        return None


def place_of(name: str, revision: str | None, key: str) -> str:
    """What `datasets` is to be given: a name on the hub, or the path of a folder.

    Raises:
        UserError: for a folder that isn't there, or one with a revision.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision:
            raise UserError(f"{key}: {path} is a folder, and has no 'revision': leave that out")
    elif name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{key}: the folder {name} does not exist")
    return path


def open_huggingface(source: Source, key: str) -> HuggingFaceSource:
    """Ask for the data set's files and fields; no record is read.

    Raises:
        UserError: for one that is unknown or unreachable, or has no such configuration, split or field.
    """
    assert source.huggingface is not None
    datasets = import_extra("datasets")
    path = place_of(source.huggingface, source.revision, key)
    split, field = source.split or "train", source.field or "text"
    try:
        # What `load_dataset(..., streaming=True)` does, with the list of files in between.
        builder = datasets.load_dataset_builder(path, source.name, revision=source.revision)
        dataset = builder.as_streaming_dataset(split=split)
    except Exception as error:  # as many kinds as there are ways to be no data set
        raise UserError(
            f"{key}: the data set {source.huggingface!r} can't be opened: {_first_line(error)}; check its "
            "name, 'name', 'split' and 'revision', and the connection"
        ) from None
    if dataset.column_names is not None:
        if field not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise UserError(f"{key}: {source.huggingface!r} has no field {field!r}; there are: {there}")
        dataset = dataset.select_columns([field])
    files = (builder.config.data_files or {}).get(split, [])
    # Of files on the hub the path holds the commit; of others the metadata holds a time or a checksum.
    versions = getattr(files, "origin_metadata", builder.hash)
    identity = (builder.config.name, split, field, list(files), versions)
    fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    known = (builder.info.splits or {}).get(split)
    num_bytes = (known.num_bytes or None) if known else None  # a card may leave it out
    name = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else source.huggingface
    return HuggingFaceSource(name, field, fingerprint, num_bytes, dataset)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
