"""Safetensors files, a tensor at a time: eight bytes of length, a JSON header, then the values themselves.

The format's own writer takes a whole file's tensors at once; here they come one by one, since the header
follows from their shapes. And its reader maps files into memory, which counts as used while it lasts; here
each tensor is read into an array of its own. https://huggingface.co/docs/safetensors has the format.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from core.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000  # as transformers has them
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the values in the file, which the header is padded to
_LONGEST_HEADER = 100_000_000  # the reference implementation's own limit


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes, from the file's begin

    def read(self) -> np.ndarray:
        """The values, read into memory of their own."""
        with open(self.file, "rb") as file:
            values = np.fromfile(file, self.dtype, math.prod(self.shape), offset=self.offset)
        return values.reshape(self.shape)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    values: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint's tensors into `folder`, each when it comes, in as many files as they need.

    Args:
        shapes: of each tensor by name.
        values: in the same order, each of its shape and of `dtype`.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    parts, remaining = _divide(sizes, shard_bytes), iter(values)
    names = [_shard_name(i, len(parts)) for i in range(len(parts))]
    for file, part in zip(names, parts, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in part}, dtype, remaining)
    if len(parts) > 1:
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def find_tensors(folder: Path, but: str = "") -> dict[str, Stored]:
    """Every tensor of a checkpoint by name; their headers alone are read.

    Args:
        but: a regular expression for the names of tensors to pass over, of whatever type.

    Raises:
        UserError: if there is no safetensors file, or one is missing, cut off or damaged, or holds another
            type of number than float32, bfloat16 and float16.
    """
    found: dict[str, Stored] = {}
    for file in _files(folder):
        found |= _read_header(file, but)
    return found


def _divide(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names, in order, in parts of at most so many bytes; a larger tensor is a part of its own."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if parts[-1] and used + size > most:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _shard_name(i: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, values: Iterator[np.ndarray]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with naming_full_disk(path), open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), value in zip(shapes.items(), values, strict=False):
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} is {value.dtype}{value.shape}, not {dtype}{shape}")
            _write_all(file, value)
        os.fsync(file.fileno())


def _write_all(file: Any, value: np.ndarray) -> None:
    rest = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """The system leaves the file's name out when a write to it fails."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _files(folder: Path) -> Sequence[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is damaged: it maps no tensors to files; copy it anew") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which {INDEX} names: copy it too")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = [file.name for file in folder.glob("*.bin")] + [file.name for file in folder.glob("*.pt*")]
    if pickled:
        raise UserError(
            f"{folder} has its weights in {sorted(pickled)[0]}, a pickle, which can run any code when it is "
            "read: load it in transformers, if you trust it, and write it with save_pretrained"
        )
    raise UserError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _read_header(path: Path, but: str) -> dict[str, Stored]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{path} is cut off or no safetensors file: copy it anew")
        text = file.read(length)
    begin, found = 8 + length, {}
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if re.fullmatch(but, name):
                continue
            shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise UserError(f"{path}: {name} is {entry['dtype']}: supported are {', '.join(DTYPES)}")
            if not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError
            if begin + stop > size:
                raise UserError(
                    f"{path} is cut off: {name} ends at byte {begin + stop} of {size}; copy it anew"
                )
            found[name] = Stored(path, dtype, shape, begin + start)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged: its header can't be read; copy it anew") from None
    return found
