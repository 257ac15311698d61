"""What a source is: shards of documents, each read alone and never whole in memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from core.errors import UserError


class Document(NamedTuple):
    """A piece of text that no attention crosses."""

    name: str  # no other document of its source has it, and it stays the same
    text: str


class Broken(NamedTuple):
    """Where a document should be and can't be read: a line that is no JSON, a record without text."""

    place: str
    reason: str


@runtime_checkable
class Documents(Protocol):
    """A source, opened. Its shards may be read in any order and on several machines."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the documents may have changed."""

    @property
    def num_bytes(self) -> int | None:
        """About how much text it is, where that can be told without reading it."""

    @property
    def num_shards(self) -> int: ...

    def documents(self, shard: int) -> Iterator[Document | Broken]:
        """Read one shard from its start.

        Raises:
            UserError: for what can't be read at all.
        """

    def names(self) -> Iterator[str] | None:
        """The names of all documents, if they are known without reading the documents."""


def from_record(record: Any, field: str, name: str, place: str) -> Document | Broken:
    """The document that stands in the `field` of a record."""
    if not isinstance(record, dict):
        return Broken(place, f"not a JSON object but {_kind(record)}")
    if field not in record:
        return Broken(place, f"no field {field!r}; there are: {', '.join(map(str, record)) or 'none'}")
    return from_value(record[field], field, name, place)


def from_value(value: Any, field: str, name: str, place: str) -> Document | Broken:
    """The document that a field holds, as a string or as bytes of UTF-8."""
    try:
        if isinstance(value, bytes):
            return Document(name, value.decode())
        if isinstance(value, str):
            value.encode()
            return Document(name, value)
    except UnicodeDecodeError as error:
        return Broken(place, f"{field!r} is not UTF-8 at byte {error.start} (0x{value[error.start]:02x})")
    except UnicodeEncodeError as error:
        return Broken(place, f"{field!r} has half a surrogate pair at character {error.start}")
    return Broken(place, f"{field!r} is not a string but {_kind(value)}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def import_extra(module: str) -> ModuleType:
    """Import a module that only some sources need.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this source needs the package {error.name or module}: pip install -e '.[data]'"
        ) from None
