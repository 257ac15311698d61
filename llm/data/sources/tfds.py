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


def open_tfds(source: Source, key: str, shard_bytes: int) -> TFDSSource:
    """Find the prepared files of a data set.

    Raises:
        UserError: for one that is unknown or not prepared, or has no such split or field.
    """
    assert source.tfds is not None
    tfds = import_extra("tensorflow_datasets")
    split, field = source.split or "train", source.field or "text"
    folder = os.path.expanduser(source.dir or "~/tensorflow_datasets")
    prepare = f"tfds.builder({source.tfds!r}, data_dir={folder!r}, file_format='array_record')"
    try:
        builder = tfds.builder(source.tfds, data_dir=folder)
    except ValueError as error:
        raise UserError(
            f"{key}: no data set {source.tfds!r} is prepared in {folder}, nor does TFDS know how to prepare "
            f"one ({str(error).splitlines()[0]}): name the folder it was prepared in as 'dir'"
        ) from None
    if not builder.info.splits:
        raise UserError(
            f"{key}: {source.tfds!r} is not prepared in {folder}: {prepare}.download_and_prepare() does that"
        )
    if re.search(r"[\[+%]", split):  # records would have other names, and so belong to another split of ours
        raise UserError(
            f"{key}: the split {split!r} is a part or a sum of others: name one, hold out by "
            "data.heldout_fraction, and leave out by data.selection"
        )
    if field not in builder.info.features:
        there = ", ".join(builder.info.features)
        raise UserError(f"{key}: {source.tfds!r} has no field {field!r}; there are: {there}")
    try:
        info = builder.info.splits[split]
        records = builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"{key}: {source.tfds!r} is prepared in {folder} in a format that has no random access: prepare "
            f"it in another folder with {prepare}.download_and_prepare()"
        ) from None
    except ValueError as error:
        raise UserError(f"{key}: {source.tfds!r}: {str(error).splitlines()[0]}") from None
    files = [(str(path), stamp(os.stat(path))) for path in info.filepaths]
    identity = (builder.info.full_name, split, field, len(records), files)
    fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    num_bytes = int(info.num_bytes) or None  # its metadata may leave it out
    shards = min(len(records), -(-(num_bytes or shard_bytes) // shard_bytes))
    return TFDSSource(source.tfds, field, fingerprint, num_bytes, shards, records)
