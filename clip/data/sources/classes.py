"""A folder of images for each class: captions are templates with the name of the class."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from clip.data.config import TEMPLATES, Source
from clip.data.sources.folder import Folder, open_folder
from clip.data.sources.source import Broken, Raw, of_class
from core.errors import UserError

_log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class ClassFolders:
    """The images below some folders. `open_classes` makes it."""

    label: str
    broken: tuple[Broken, ...]
    names: tuple[str, ...]  # of files: CLASS/...
    templates: tuple[str, ...]
    folder: Folder

    @property
    def fingerprint(self) -> str:
        parts = (self.templates, self.names, self.folder.stamp(self.names))
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({_class_name(name) for name in self.names}))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Raw:
        name = _class_name(self.names[index])
        return Raw(self.folder.read(self.names[index]), of_class(name, self.templates), name)


def open_classes(source: Source, key: str) -> ClassFolders:
    """List the images of each class; an underscore in the name of a folder is a space in that of its class.

    Raises:
        UserError: for a folder that is not there, or in which no folder holds images.
    """
    assert source.classes is not None
    folder = open_folder(source.classes, key)
    names = tuple(name for name in folder.names() if "/" in name and name.lower().endswith(SUFFIXES))
    if not names:
        raise UserError(
            f"{key}: {source.classes} has no folder with images ({', '.join(SUFFIXES)}): each class is a "
            "folder of its own"
        )
    _warn_of_folders_in_classes(names, source.classes, key)
    return ClassFolders(source.classes, (), names, source.templates or TEMPLATES, folder)


def _warn_of_folders_in_classes(names: tuple[str, ...], path: str, key: str) -> None:
    """As of `photos/train/cat/0.png` under `photos`: more likely of class cat than of class train."""
    inner = {tuple(name.split("/")[:2]) for name in names if name.count("/") > 1}
    outer = sorted({name for name, _ in inner})
    if len(inner) > len(outer):  # else a folder for the images of a class, as Tiny ImageNet has it
        first = outer[0]
        among = ", ".join(sorted(name for place, name in inner if place == first)[:3])
        _log.warning(
            "%s: the classes are the folders in %s, such as %s, which has folders of images in it (%s): if "
            "those are the classes, name %s/%s", key, path, first, among, path, first,
        )  # fmt: skip


def _class_name(name: str) -> str:
    return name.split("/")[0].replace("_", " ")
