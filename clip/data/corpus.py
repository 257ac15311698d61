"""The examples of an experiment: their sources, which of them are broken, and which are held out.

All images are decoded once when a source is opened for the first time, which takes about the time of an
epoch, and what was found is kept. So a run knows its examples before it starts: no batch depends on what
broke, an epoch has each intact image once, and a data set of the wrong format ends the run at once, not in
the night. It also tells images by their content: what two records or two sources show twice is one example
with the captions of both, and one image is never on both sides, whatever its copies are called.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from clip.data.config import DataConfig, Source
from clip.data.images import BrokenImage, Unread, decode, from_array
from clip.data.scenes import Scenes
from clip.data.sources.classes import open_classes
from clip.data.sources.hubs import open_huggingface, open_tfds
from clip.data.sources.source import Broken, Images, Raw
from clip.data.sources.tables import open_table
from clip.data.split import Classes, Example, Split
from core.errors import UserError
from core.files import write_atomically
from core.log import progress

_log = logging.getLogger(__name__)

_NAMED = 3  # broken images that a warning names


class Splits(NamedTuple):
    """Both sides of an experiment."""

    train: Split
    heldout: Split


class Entry(NamedTuple):
    """What is known of an intact image."""

    source: Images
    number: int  # in its source
    digest: str  # of its content
    captions: tuple[str, ...]
    label: int | None


@dataclass(frozen=True)
class Photos:
    """The images of one side, each once."""

    entries: tuple[Entry, ...]
    classes: Classes | None

    @property
    def fingerprint(self) -> str:
        parts = [(entry.digest, entry.captions, entry.label) for entry in self.entries]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[index]
        name = entry.source.name(entry.number)
        try:
            image = _decode(entry.source.read(entry.number))
        except BrokenImage as error:
            raise UserError(
                f"{entry.source.label}: {name} was intact when the run started and can't be read any more "
                f"({error}): run the same command again"
            ) from None
        return Example(image, entry.captions, name, entry.label)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[index].captions

    def label(self, index: int) -> int | None:
        return self.entries[index].label


def open_splits(config: DataConfig, seed: int, cache: Path) -> Splits:
    """Open both sides; `cache` is a folder for what is found out about images.

    Of the embedded scenes, those to train on depend on `seed`, the held-out ones do not. Other images are
    held out by their content, whatever the seed. With `data.heldout`, what both name is held out.

    Raises:
        UserError: for a source that can't be opened, more than `broken_fraction` of broken images, or a side
            without images.
    """
    if config.sources[0].embedded:
        return Splits(Scenes(seed, heldout=False), Scenes(0, heldout=True))
    train = [_open(source, f"data.sources.{number}") for number, source in enumerate(config.sources)]
    held = [_open(source, f"data.heldout.{number}") for number, source in enumerate(config.heldout or ())]
    classes = _classes([*train, *held])
    entries, others = (
        _merged(_entries(group, classes, config.broken_fraction, cache), key)
        for group, key in ((train, "data.sources"), (held, "data.heldout"))
    )
    if held:
        taken = {entry.digest for entry in others}
        kept = [entry for entry in entries if entry.digest not in taken]
        if len(kept) < len(entries):
            _log.info("%d images of data.sources are in data.heldout too: held out", len(entries) - len(kept))
    else:
        taken = _held_out([entry.digest for entry in entries], config.heldout_fraction)
        kept = [entry for entry in entries if entry.digest not in taken]
        others = [entry for entry in entries if entry.digest in taken]
    if not kept:
        raise UserError("data.heldout names every image of data.sources: none is left to train on")
    return Splits(Photos(tuple(kept), classes), Photos(tuple(others), classes))


def _open(source: Source, key: str) -> Images:
    if source.classes:
        return open_classes(source, key)
    if source.huggingface:
        return open_huggingface(source, key)
    return open_tfds(source, key) if source.tfds else open_table(source, key)


def _classes(sources: Sequence[Images]) -> Classes | None:
    names = sorted({name for source in sources for name in source.classes})
    templates = dict.fromkeys(template for source in sources for template in source.templates)
    return Classes(tuple(names), tuple(templates)) if names else None


def _entries(
    sources: Iterable[Images], classes: Classes | None, broken_fraction: float | int, cache: Path
) -> list[Entry]:
    """The intact images of some sources."""
    entries = []
    labels = {name: label for label, name in enumerate(classes.names)} if classes else {}
    for source in sources:
        verdicts = _look(source, cache)
        _report(source, verdicts, broken_fraction)
        for index, verdict in enumerate(verdicts):
            if verdict.reason is None:
                label = labels.get(verdict.class_name or "")
                entries.append(Entry(source, index, verdict.digest, verdict.captions, label))
    return entries


def _merged(entries: Sequence[Entry], key: str) -> list[Entry]:
    """Each content once, with the captions of all its copies and the class of the first that has one."""
    found: dict[str, Entry] = {}
    for entry in entries:
        known = found.setdefault(entry.digest, entry)
        if known is not entry:
            captions = tuple(dict.fromkeys((*known.captions, *entry.captions)))
            label = known.label if known.label is not None else entry.label
            found[entry.digest] = known._replace(captions=captions, label=label)
    if len(found) < len(entries):
        _log.info(
            "%s: %s of %s images are copies of others: merged, with all captions and the class of the first",
            key, f"{len(entries) - len(found):,}", f"{len(entries):,}",
        )  # fmt: skip
    return list(found.values())


def _held_out(digests: Sequence[str], fraction: float) -> set[str]:
    """About that fraction of all, by their own value; at least one and not all."""
    if len(digests) < 2:
        raise UserError(
            f"data.sources hold {len(digests)} intact image, and some must be held out: name others in "
            "data.heldout"
        )
    ordered = sorted(digests)
    count = sum(int(digest, 16) < fraction * 2**64 for digest in digests)
    return set(ordered[: min(max(count, 1), len(digests) - 1)])


class _Verdict(NamedTuple):
    digest: str
    reason: str | None  # why an image can't be used; None: it is intact
    captions: tuple[str, ...]
    class_name: str | None


def _look(source: Images, cache: Path) -> list[_Verdict]:
    """Decode every image of a source once, or read what was found when that was done.

    Raises:
        UserError: for images that can't be read for a reason that may pass. Without them the data would be
            other data when the same command runs again. What was found of the rest is kept.
    """
    # What one version of Pillow can't decode another can.
    file = cache / "images" / f"{source.fingerprint}-{PIL.__version__}.json"
    found = _kept(file)
    numbers = [number for number in range(len(source)) if number not in found]
    if numbers:
        looked, unread = _look_at(source, numbers)
        found |= looked
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found))
        if unread:
            raise UserError(
                f"{source.label}: {len(unread):,} of {len(source):,} images can't be read now ({unread[0]}): "
                "run the same command again, or take them out of the source if that stays so"
            )
    return [found[number] for number in range(len(source))]


def _kept(file: Path) -> dict[int, _Verdict]:
    """What was found of a source's images by their number: nothing where the file is missing or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {
            int(number): _Verdict(digest, reason, tuple(captions), name)
            for number, (digest, reason, captions, name) in kept.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _look_at(source: Images, numbers: Sequence[int]) -> tuple[dict[int, _Verdict], list[str]]:
    """What is found of these images, and which of them could not be read this time, and why."""
    unread = []

    def look(number: int) -> _Verdict | None:
        try:
            raw = source.read(number)
            _decode(raw)
            return _Verdict(_digest(raw), None, raw.captions, raw.class_name)
        except Unread as error:
            unread.append(f"{source.name(number)}: {error}")
            return None
        except BrokenImage as error:
            return _Verdict("", str(error), (), None)

    found = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress(f"looking at the images of {source.label}", len(numbers)) as update,
    ):
        for done, (number, verdict) in enumerate(zip(numbers, threads.map(look, numbers), strict=True), 1):
            if verdict is not None:
                found[number] = verdict
            if done % 100 == 0 or done == len(numbers):
                update(done)
    return found, unread


def _report(source: Images, verdicts: Sequence[_Verdict], broken_fraction: float | int) -> None:
    named = [Broken(source.name(i), v.reason) for i, v in enumerate(verdicts) if v.reason is not None]
    broken, total = [*source.broken, *named], len(source.broken) + len(verdicts)
    if not broken:
        return
    first = "; ".join(f"{place}: {reason}" for place, reason in broken[:_NAMED])
    more = f"; and {len(broken) - _NAMED:,} more" if len(broken) > _NAMED else ""
    tally = f"{source.label}: {len(broken):,} of {total:,} images or rows are broken ({first}{more})"
    if len(broken) > broken_fraction * total:
        raise UserError(
            f"{tally}. That is more than data.broken_fraction ({broken_fraction:g}) of them: "
            "mend the source, or raise that"
        )
    _log.warning("%s: left out", tally)


def _decode(raw: Raw) -> Image.Image:
    return from_array(raw.image) if isinstance(raw.image, np.ndarray) else decode(raw.image)


def _digest(raw: Raw) -> str:
    if isinstance(raw.image, bytes):
        return hashlib.blake2b(raw.image, digest_size=8).hexdigest()
    header = repr((raw.image.shape, raw.image.dtype.str)).encode()
    return hashlib.blake2b(header + np.ascontiguousarray(raw.image).tobytes(), digest_size=8).hexdigest()


def open_labelled(folder: str, key: str, cache: Path, broken_fraction: float | int) -> Photos:
    """All images of a folder with a folder a class, to be classified; broken ones are named and left out.

    Copies count as often as they are there, as in the figures of others.

    Args:
        key: what the user knows `folder` by.

    Raises:
        UserError: for what is no such folder or has but one class, or more than `broken_fraction` of broken
            images.
    """
    sources = [_open(Source(classes=folder), key)]
    classes = _classes(sources)
    if classes and len(classes.names) == 1:
        raise UserError(
            f"{key}: {folder} has images of one class only ({classes.names[0]!r}), and nothing to choose "
            "from: name the folder that holds a folder for each class"
        )
    return Photos(tuple(_entries(sources, classes, broken_fraction, cache)), classes)
