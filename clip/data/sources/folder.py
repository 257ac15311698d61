"""Folders of files, on disk or inside a zip archive."""

from __future__ import annotations

import hashlib
import os
import posixpath
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from clip.data.images import BrokenImage, unread
from core.errors import UserError

LARGEST_BYTES = 256_000_000  # of a picture: what is larger is none


@runtime_checkable
class Folder(Protocol):
    """Files by their names, which are relative and have slashes."""

    def names(self) -> list[str]:
        """All files in it and below, sorted; none that is hidden. Links are followed."""

    def read(self, name: str, picture: bool = True) -> bytes:
        """
        Raises:
            BrokenImage: for a file that is missing or can't be read, or is too large for a picture.
        """

    def stamp(self, names: Iterable[str]) -> str:
        """Changes whenever the content of these files may have changed."""

    def inside(self, name: str) -> str | None:
        """The name in its one spelling; None for one that leads out of the folder."""


class DiskFolder:
    """A folder of the file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        found = []
        parents: dict[str, frozenset[str]] = {os.fspath(self.path): frozenset()}  # of the folders to come
        for folder, folders, files in os.walk(self.path, followlinks=True):
            here, above = os.path.realpath(folder), parents.pop(folder)
            if here in above:  # a link to a folder that it lies in
                folders.clear()
                continue
            folders[:] = [name for name in folders if _visible(name)]
            parents |= dict.fromkeys((os.path.join(folder, name) for name in folders), above | {here})
            relative = os.path.relpath(folder, self.path).replace(os.sep, "/")
            found += [posixpath.normpath(f"{relative}/{name}") for name in files if _visible(name)]
        return sorted(found)

    def read(self, name: str, picture: bool = True) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                if picture:
                    _limit(os.fstat(file.fileno()).st_size)
                return file.read()
        except FileNotFoundError:
            raise BrokenImage("there is no such file") from None
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
            raise unread(error, getattr(error, "strerror", None) or str(error)) from None

    def stamp(self, names: Iterable[str]) -> str:
        digest = hashlib.blake2b(str(self.path.resolve()).encode(), digest_size=8)
        for name in names:
            try:
                status = os.stat(self.path / name)
                stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_mode}"
            except (OSError, ValueError):
                stamp = "missing"
            digest.update(repr((name, stamp)).encode())
        return digest.hexdigest()

    def inside(self, name: str) -> str | None:
        root = os.path.abspath(self.path)
        path = os.path.normpath(os.path.join(root, name))
        relative = os.path.relpath(path, root).replace(os.sep, "/")
        return None if relative == ".." or relative.startswith("../") else relative


class ZipFolder:
    """A folder inside a zip archive."""

    def __init__(self, archive: Path, folder: str, key: str) -> None:
        self._archive, self._folder = archive, f"{folder}/" if folder else ""
        try:
            self._zip = zipfile.ZipFile(archive)
        except Exception as error:  # a damaged directory has many ways to mislead
            raise UserError(
                f"{key}: {archive} can't be opened as a zip archive ({error}): fetch it again"
            ) from None
        self._members = {
            info.filename.removeprefix(self._folder): info
            for info in self._zip.infolist()
            if info.filename.startswith(self._folder) and not info.is_dir()
        }

    def names(self) -> list[str]:
        return sorted(name for name in self._members if all(map(_visible, name.split("/"))))

    def read(self, name: str, picture: bool = True) -> bytes:
        info = self._members.get(name)
        if info is None:
            raise BrokenImage("there is no such file in the archive")
        if picture:
            _limit(info.file_size)
        try:
            return self._zip.read(info)
        except Exception as error:  # of checksums, of decompression, of passwords
            raise unread(error, str(error)) from None

    def stamp(self, names: Iterable[str]) -> str:
        found = [(name, self._members.get(name)) for name in names]
        content = [(name, info and (info.CRC, info.file_size)) for name, info in found]
        return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()

    def inside(self, name: str) -> str | None:
        name = posixpath.normpath(name)
        return None if name.startswith(("/", "../")) or name == ".." else name


def open_folder(path: str, key: str) -> Folder:
    """The folder at a path, which may lead into a zip archive.

    Raises:
        UserError: naming `key`, where there is no such folder.
    """
    full = Path(os.path.expanduser(path))
    if full.is_dir():
        return DiskFolder(full)
    for archive in (full, *full.parents):
        if archive.is_file():
            if not zipfile.is_zipfile(archive):
                raise UserError(
                    f"{key}: {archive} is a file and no zip archive, or one that was cut off: name a folder "
                    "or a .zip, or fetch it again"
                )
            folder = full.relative_to(archive).as_posix()
            opened = ZipFolder(archive, "" if folder == "." else folder, key)
            if not opened.names():
                raise UserError(f"{key}: {archive} holds nothing under {folder!r}")
            return opened
    raise UserError(f"{key}: the folder {path} does not exist (from {os.getcwd()})")


def open_file(path: str, key: str) -> tuple[bytes, Folder]:
    """The content of a file, which may lie in a zip archive, and the folder it lies in.

    Raises:
        UserError: naming `key`, where there is no such file.
    """
    full = Path(os.path.expanduser(path))
    if not full.name or full.is_dir():
        raise UserError(f"{key}: {path} is a folder: name the file in it")
    try:
        folder = open_folder(str(full.parent), key)
        return folder.read(full.name, picture=False), folder
    except BrokenImage as error:
        raise UserError(f"{key}: {path} can't be read: {error}") from None


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db")


def _limit(size: int) -> None:
    if size > LARGEST_BYTES:
        raise BrokenImage(f"{size:,} bytes are too many")
