"""Tables that name images and say what they show: CSV, TSV, JSON lines.

A row that is malformed, or names no image or no caption, or whose image lies outside the folder of the
images, is broken. So a table from elsewhere can't make a run read what stands elsewhere on a disk;
`images: /` allows all paths.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from clip.data.config import Source
from clip.data.images import BrokenImage
from clip.data.sources.folder import Folder, open_file, open_folder
from clip.data.sources.source import Broken, Raw, captions_of, field
from core.errors import UserError


@dataclass(frozen=True)
class Table:
    """The images that a table names, each once, with all its captions. `open_table` makes it."""

    classes: ClassVar[tuple[str, ...]] = ()
    templates: ClassVar[tuple[str, ...]] = ()

    label: str
    broken: tuple[Broken, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # name of the file, captions
    folder: Folder
    digest: str  # of the table's bytes and how they are read

    @property
    def fingerprint(self) -> str:
        parts = (self.digest, self.folder.stamp(name for name, _ in self.rows))
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index][0]

    def read(self, index: int) -> Raw:
        name, captions = self.rows[index]
        return Raw(self.folder.read(name), captions)


def open_table(source: Source, key: str) -> Table:
    """Read a table, none of its images.

    Raises:
        UserError: for a file or folder that is not there, a column that the table hasn't, or an encoding
            that is not UTF-8 throughout.
    """
    path = source.csv or source.jsonl
    assert path is not None
    data, beside = open_file(path, key)
    folder = beside if source.images is None else open_folder(source.images, f"{key}.images")
    image, caption = source.image or "image", source.caption or "caption"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{key}: {path} is UTF-16: save it as UTF-8")
    text = data.decode("utf-8-sig", "surrogateescape")  # what is not UTF-8 breaks its own row
    read = _csv_rows if source.csv else _json_rows
    broken: list[Broken] = []
    found: dict[str, list[str]] = {}
    for place, row in read(text, path, key, image, caption):
        try:
            if isinstance(row, str):
                raise BrokenImage(row)
            name = _inside(field(row, image.split("/")), folder)
            captions = captions_of(field(row, caption.split("/")))
            found.setdefault(name, []).extend(captions)  # an image that no row describes is not there
        except BrokenImage as error:
            broken.append(Broken(place, str(error)))
    if not found:
        first = f": {broken[0].place}: {broken[0].reason}" if broken else ""
        raise UserError(f"{key}: {path} names no image with a caption{first}")
    rows = tuple((name, tuple(dict.fromkeys(captions))) for name, captions in found.items())
    digest = hashlib.blake2b(data, digest_size=8)
    digest.update(repr((image, caption, source.images)).encode())
    return Table(path, tuple(broken), rows, folder, digest.hexdigest())


def _inside(name: Any, folder: Folder) -> str:
    if not isinstance(name, str) or not name.strip():
        raise BrokenImage("it names no image")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise BrokenImage("the name of its image is not UTF-8")
    inside = folder.inside(name.strip())
    if inside is None:
        raise BrokenImage(f"its image {name!r} lies outside the folder of the images")
    return inside


def _csv_rows(text: str, path: str, key: str, *columns: str) -> Iterator[tuple[str, dict | str]]:
    """The place of each row, and the row, or why it is none."""
    delimiter = "\t" if path.endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        place = f"{path}, line {start}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise UserError(
                    f"{key}: {path}: a quotation mark is opened in line {start} and never closed: close it, "
                    "or double it where it is part of a caption"
                ) from None
            yield place, str(error)
            continue
        if header is None:
            header = [name.strip() for name in row]
            for column in columns:
                if column not in header:
                    option = "image" if column == columns[0] else "caption"
                    raise UserError(
                        f"{key}: {path} has no column {column!r}; there are: {', '.join(header)}; name one "
                        f"with '{option}:'"
                    )
        elif len(row) != len(header):
            if row:  # else an empty line
                yield place, f"it has {len(row)} fields, and the header {len(header)}"
        else:
            yield place, dict(zip(header, row, strict=True))


def _json_rows(text: str, path: str, key: str, *columns: str) -> Iterator[tuple[str, dict | str]]:
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield place, "it is not JSON"
            continue
        if not isinstance(row, dict):
            yield place, "it is not a JSON object"
            continue
        for column in columns if first else ():
            if column.split("/")[0] not in row:
                option = "image" if column == columns[0] else "caption"
                raise UserError(
                    f"{key}: {place} has no field {column!r}; there are: {', '.join(row)}; name one with "
                    f"'{option}:'"
                )
        first = False
        yield place, row
