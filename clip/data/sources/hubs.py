"""Data sets of Hugging Face and TFDS that hold images with captions."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip.data.config import TEMPLATES, Source
from clip.data.images import BrokenImage, unread
from clip.data.sources.source import Broken, Raw, captions_of, field, of_class
from core.errors import UserError
from llm.data.sources.document import import_extra
from llm.data.sources.huggingface import place_of
from llm.data.sources.tfds import open_builder, open_records


@dataclass(frozen=True)
class Records:
    """One split of a data set. `open_huggingface` and `open_tfds` make it."""

    label: str
    broken: tuple[Broken, ...]
    records: Any  # mappings by number
    image: str
    caption: str
    fingerprint: str
    names: tuple[str, ...]  # of classes by their number, where captions are made of classes
    templates: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.names)))

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return f"{self.label}#{index}"

    def read(self, index: int) -> Raw:
        try:
            record = self.records[index]
        except Exception as error:  # of parsing, of decoding, of reading: no common base
            raise unread(error, _first_line(error)) from None
        image = field(record, self.image.split("/"))
        if isinstance(image, dict):  # how Hugging Face keeps an image that it has not decoded
            image = image["bytes"] if image.get("bytes") is not None else _read(image.get("path"))
        if not isinstance(image, (bytes, np.ndarray)):
            raise BrokenImage(f"{self.image!r} holds no image but {type(image).__name__}")
        said = field(record, self.caption.split("/"))
        if not self.names:
            return Raw(image, captions_of(said))
        if not isinstance(said, (int, np.integer)) or not 0 <= said < len(self.names):
            raise BrokenImage(f"{self.caption!r} is {said}, which is the number of no class")
        name = self.names[said]
        return Raw(image, of_class(name, self.templates), name)


def open_huggingface(source: Source, key: str) -> Records:
    """Open a data set; what is not in the cache of `datasets` is downloaded by it.

    Raises:
        UserError: for one that is unknown or unreachable, or has no such configuration, split or column.
    """
    assert source.huggingface is not None
    datasets = import_extra("datasets")
    path = place_of(source.huggingface, source.revision, key)
    try:
        dataset = datasets.load_dataset(
            path, source.name, split=source.split or "train", revision=source.revision
        )
    except Exception as error:  # as many kinds as there are ways to be no data set
        raise UserError(
            f"{key}: the data set {source.huggingface!r} can't be opened: {_first_line(error)}; check its "
            "name, 'name', 'split' and 'revision', and the connection"
        ) from None
    image, caption = source.image or "image", source.caption or "caption"
    _feature(dataset.features, image, "image", key, source.huggingface)
    said = _feature(dataset.features, caption, "caption", key, source.huggingface)
    names, templates = _classes(said, isinstance(said, datasets.ClassLabel), source, key)
    top = image.split("/")[0]
    if isinstance(dataset.features[top], datasets.Image):
        dataset = dataset.cast_column(top, datasets.Image(decode=False))
    dataset = dataset.select_columns(list(dict.fromkeys((top, caption.split("/")[0]))))
    fingerprint = _fingerprint(dataset._fingerprint, image, caption, names, templates)
    return Records(source.label, (), dataset, image, caption, fingerprint, names, templates)


def open_tfds(source: Source, key: str) -> Records:
    """Find the prepared files of a data set. They are read without TensorFlow.

    Encoded images are taken as they are, so that one that is elsewhere too is known again.

    Raises:
        UserError: for one that is unknown or not prepared, or has no such split or field.
    """
    assert source.tfds is not None
    tfds, builder = import_extra("tensorflow_datasets"), open_builder(source.tfds, source.dir, key)
    image, caption = source.image or "image", source.caption or "caption"
    pixels = _feature(builder.info.features, image, "image", key, source.tfds)
    said = _feature(builder.info.features, caption, "caption", key, source.tfds)
    names, templates = _classes(said, isinstance(said, tfds.features.ClassLabel), source, key)
    decoders: Any = None
    if isinstance(pixels, tfds.features.Image) and pixels.np_dtype in (np.uint8, np.uint16):
        decoders = tfds.decode.SkipDecoding()
        for part in reversed(image.split("/")):
            decoders = {part: decoders}
    split = source.split or "train"
    records, info = open_records(builder, source.tfds, split, key, decoders)
    files = [(str(path), os.stat(path).st_mtime_ns) for path in info.filepaths]
    identity = (builder.info.full_name, split, image, caption, names, templates, len(records), files)
    return Records(source.label, (), records, image, caption, _fingerprint(identity), names, templates)


def _feature(features: Any, column: str, option: str, key: str, name: str) -> Any:
    """What either library says that a column holds, of `a/b` field b of a, whether or not a is a list."""
    parts = column.split("/")
    for number, part in enumerate(parts):
        while hasattr(features, "feature"):  # a list
            features = features.feature
        there = list(features) if hasattr(features, "keys") else []
        if part not in there:
            inside = "/".join(parts[:number])
            held = ", ".join(there) or "nothing"
            where = f"in {inside!r} there is {held}" if inside else f"there are: {held}"
            raise UserError(f"{key}: {name!r} has no column {column!r}; {where}; name one with '{option}:'")
        features = features[part]
    return features


def _classes(said: Any, labels: bool, source: Source, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes that a column of `labels` holds, and what is said of them."""
    if labels:
        return tuple(name.replace("_", " ") for name in said.names), source.templates or TEMPLATES
    if source.templates:
        raise UserError(
            f"{key}: templates are for classes, and {source.caption or 'caption'!r} holds none: name a "
            "column of class labels with 'caption:', or leave templates out"
        )
    return (), ()


def _read(path: str | None) -> bytes:
    try:
        with open(path or "", "rb") as file:
            return file.read()
    except OSError as error:
        raise unread(error, f"{path}: {error.strerror}") from None


def _fingerprint(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
