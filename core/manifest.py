"""Checksums of a folder's files, so that damage is found and named before anything is read from it.

Neither Orbax nor TensorStore keeps one: a flipped bit in a tensor would be restored without a word.
CRC-32 finds every flipped bit and every burst of up to 32, misses one random damage in four billion, and
costs less than half of SHA-256; it guards against failing storage, not against forgery.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path

from core.errors import UserError
from core.files import sync_folder, write_atomically

NAME = "manifest.json"
FORMAT = 1
_BLOCK = 1 << 20  # bytes read at a time


def write(folder: Path) -> None:
    """Write `folder/manifest.json`: size and CRC-32 of every file below, each made durable first."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.name != NAME):
        if path.is_dir():
            sync_folder(path)
        else:
            files[path.relative_to(folder).as_posix()] = _measure(path, durable=True)
    write_atomically(folder / NAME, _render(FORMAT, files))


def find_damage(folder: Path, parts: Collection[str]) -> str | None:
    """What is wrong with the first damaged file, in words that begin with its path; None if all is well.

    Looks at the files directly in `folder` and those in its subfolders named by `parts`, no others.

    Raises:
        UserError: when a later version of this program wrote the manifest.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        manifest = json.loads(text)
        intact = text == _render(manifest["format"], manifest["files"])
    except FileNotFoundError:
        return f"{NAME}: missing"
    except OSError as error:
        return f"{NAME}: can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"{NAME}: not what was written"
    refuse_newer(folder, manifest["format"])
    for name, expected in manifest["files"].items():
        part, slash, _ = name.partition("/")
        if slash and part not in parts:
            continue
        problem = _compare(folder / name, expected)
        if problem:
            return f"{name}: {problem}"
    return None


def refuse_newer(folder: Path, number: int) -> None:
    """Raise a `UserError` if `folder` is of a checkpoint format that this version does not know."""
    if number > FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {number}, and this version reads up to {FORMAT}: "
            "update this checkout and try again"
        )


def _render(number: int, files: dict) -> str:
    """The manifest's text; it carries a checksum of itself, so that its own damage shows."""
    content = {"format": number, "files": files}
    checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "crc32": f"{checksum:08x}"}, indent=1, sort_keys=True)


def _compare(path: Path, expected: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size < expected["size"]:
            return f"truncated ({size} of {expected['size']} bytes)"
        if size > expected["size"]:
            return f"too long ({size} bytes, written as {expected['size']})"
        if _measure(path)["crc32"] != expected["crc32"]:
            return "checksum differs from what was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None


def _measure(path: Path, durable: bool = False) -> dict[str, int | str]:
    size, checksum = 0, 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
        if durable:
            os.fsync(file.fileno())
    return {"size": size, "crc32": f"{checksum:08x}"}
