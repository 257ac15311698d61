"""TensorFlow Datasets that are prepared as ArrayRecord, read without TensorFlow.

A shard is a range of records of about the bytes of any other shard, a document `NAME#INDEX`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from llm.data.config import Source
from llm.data.sources.document import Broken, Document, from_record, import_extra
from llm.data.sources.listing import stamp

_RECORDS = 256  # read at a time


@dataclass(frozen=True)
class TFDSSource:
    """One split of a data set. `open_tfds` makes it."""

    name: str
    field: str
    fingerprint: str
    num_bytes: int | None
    num_shards: int
    records: Any  # a sequence of mappings that is read where it is asked

    def documents(self, shard: int) -> Iterator[Document | Broken]:
        begin, end = (len(self.records) * k // self.num_shards for k in (shard, shard + 1))
        for start in range(begin, end, _RECORDS):
            some = range(start, min(start + _RECORDS, end))
            try:
                records = self.records.__getitems__(some)
            except (RuntimeError, OSError) as error:
                raise UserError(
                    f"tfds:{self.name} can't be read near record {start} ({error}): prepare it again"
                ) from None
            for index, record in zip(some, records, strict=True):
                place = f"tfds:{self.name}, record {index}"
                yield from_record(record, self.field, f"{self.name}#{index}", place)

    def names(self) -> None:
        return None


def open_builder(name: str, folder: str | None, key: str) -> Any:
    """The builder of a data set that is prepared in `folder`, or where TFDS does it by itself.

    Raises:
        UserError: for one that is unknown or not prepared.
    """
    tfds = import_extra("tensorflow_datasets")
    folder = os.path.expanduser(folder or "~/tensorflow_datasets")
    try:
        builder = tfds.builder(name, data_dir=folder)
    except ValueError as error:
        raise UserError(
            f"{key}: no data set {name!r} is prepared in {folder}, nor does TFDS know how to prepare "
            f"one ({str(error).splitlines()[0]}): name the folder it was prepared in as 'dir'"
        ) from None
    if not builder.info.splits:
        raise UserError(f"{key}: {name!r} is not prepared in {folder}: {_prepare(name, folder)} does that")
    return builder


def open_records(builder: Any, name: str, split: str, key: str, decoders: Any = None) -> tuple[Any, Any]:
    """The records of a split, by number, and what TFDS says of it.

    Raises:
        UserError: for a split that isn't there, or a format without random access.
    """
    try:
        return builder.as_data_source(split, decoders=decoders), builder.info.splits[split]
    except NotImplementedError:
        folder = os.fspath(builder.data_dir_root)
        raise UserError(
            f"{key}: {name!r} is prepared in {folder} in a format that has no random access: prepare "
            f"it in another folder with {_prepare(name, folder)}"
        ) from None
    except ValueError as error:
        raise UserError(f"{key}: {name!r}: {str(error).splitlines()[0]}") from None


def _prepare(name: str, folder: str) -> str:
    return f"tfds.builder({name!r}, data_dir={folder!r}, file_format='array_record').download_and_prepare()"


def open_tfds(source: Source, key: str, shard_bytes: int) -> TFDSSource:
    """Find the prepared files of a data set.

    Raises:
        UserError: for one that is unknown or not prepared, or has no such split or field.
    """
    assert source.tfds is not None
    split, field = source.split or "train", source.field or "text"
    builder = open_builder(source.tfds, source.dir, key)
    if re.search(r"[\[+%]", split):  # records would have other names, and so belong to another split of ours
        raise UserError(
            f"{key}: the split {split!r} is a part or a sum of others: name one, hold out by "
            "data.heldout_fraction, and leave out by data.selection"
        )
    if field not in builder.info.features:
        there = ", ".join(builder.info.features)
        raise UserError(f"{key}: {source.tfds!r} has no field {field!r}; there are: {there}")
    records, info = open_records(builder, source.tfds, split, key)
    files = [(str(path), stamp(os.stat(path))) for path in info.filepaths]
    identity = (builder.info.full_name, split, field, len(records), files)
    fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    num_bytes = int(info.num_bytes) or None  # its metadata may leave it out
    shards = min(len(records), -(-(num_bytes or shard_bytes) // shard_bytes))
    return TFDSSource(source.tfds, field, fingerprint, num_bytes, shards, records)
