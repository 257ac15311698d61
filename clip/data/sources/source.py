"""What a source is: images by number, each with its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip.data.images import BrokenImage


class Raw(NamedTuple):
    """An image as its source holds it, and what is said of it."""

    image: bytes | np.ndarray  # encoded, or [H W C] where a library has decoded it
    captions: tuple[str, ...]
    class_name: str | None = None  # one of `Images.classes`


class Broken(NamedTuple):
    """A row, image or record that can't be used, and why."""

    place: str
    reason: str


@runtime_checkable
class Images(Protocol):
    """A source, opened. It may be read in any order and in several threads."""

    @property
    def label(self) -> str: ...

    @property
    def broken(self) -> tuple[Broken, ...]:
        """Rows that name no image, or no caption."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What its images are, where each is of a class; else nothing."""

    @property
    def templates(self) -> tuple[str, ...]:
        """What is said of a class, whose name is `{}`."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the images or captions may have changed."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """No other image of the source has it."""

    def read(self, index: int) -> Raw:
        """
        Raises:
            BrokenImage: for one that is missing or unreadable, or has no caption.
        """


def of_class(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """What the templates say of a class."""
    return tuple(template.replace("{}", name) for template in templates)


def captions_of(value: Any) -> tuple[str, ...]:
    """The texts in a field: one, or a list of them. Blank ones are none.

    Raises:
        BrokenImage: where there is none, or it is no text.
    """
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    captions = []
    for each in values:
        if isinstance(each, bytes):
            try:
                each = each.decode()
            except UnicodeDecodeError as error:
                raise BrokenImage(f"its caption is not UTF-8 at byte {error.start}") from None
        if not isinstance(each, str):
            kind = "null" if each is None else type(each).__name__
            raise BrokenImage(f"its caption is not a string but {kind}")
        if any("\ud800" <= character <= "\udfff" for character in each):
            raise BrokenImage("its caption is not UTF-8")
        if each.strip():
            captions.append(" ".join(each.split()))
    if not captions:
        raise BrokenImage("it has no caption")
    return tuple(captions)


def field(record: Any, path: Sequence[str]) -> Any:
    """What stands in a record under `a/b`: field b of field a, or of each where a is a list."""
    for number, part in enumerate(path):
        if isinstance(record, list):
            return [field(each, path[number:]) for each in record]
        if not isinstance(record, dict) or part not in record:
            raise BrokenImage(f"it has no {'/'.join(path)!r}")
        record = record[part]
    return record
