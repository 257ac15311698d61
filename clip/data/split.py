"""What a split is: examples by number, each an image and its captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from PIL.Image import Image


class Example(NamedTuple):
    """An image, RGB in its own size, and what is said of it."""

    image: Image
    captions: tuple[str, ...]  # at least one
    id: str  # no other example of its split has it, and it stays the same
    label: int | None = None  # which of `Split.classes` it is, where one is


@dataclass(frozen=True)
class Classes:
    """What zero-shot classification chooses from. In a template `{}` stands for the name of a class."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    # [classes] whether training never shows a class, though it shows each word of its name; None: no class
    # is left out on purpose.
    heldout: tuple[bool, ...] | None = None


@runtime_checkable
class Split(Protocol):
    """Random access to the intact examples of one side: training or held out."""

    @property
    def classes(self) -> Classes | None: ...

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """
        Raises:
            UserError: for an image that could be read when the split was opened and can't any more.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of an example, without its image."""

    def label(self, index: int) -> int | None:
        """That of an example, without its image."""
