"""A selection file: what documents count in training, without a rewrite of their shards.

    {"document": "a.txt", "weight": 0}                         dropped: none of its tokens is read
    {"document": "b.txt", "weight": 2.5}                       multiplies the weight of its loss
    {"document": "c.txt", "weight": 0.5, "source": "x/*.txt"}  where two sources have a document of that name

A document that no line names keeps its weight. A Parquet file (`.parquet`) with these columns does as well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from llm.data.corpus import Split
from llm.data.loader import Selection, read_index
from llm.data.shards import shard_folder

_log = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)

_Key = str | tuple[str, str]  # a name; or a source, as the configuration spells it, and a name in it


def read_selection(path: Path, folders: Sequence[Path]) -> Selection:
    """Look up what `path` says of each training document in `folders`: all the shards that are trained on.

    A line about a held-out document does nothing: who writes it can't know how documents are split.

    Raises:
        UserError: for a file that is missing or damaged; a line without a document, or without a weight
            that is finite and not negative; a document that is named with two weights, is in two sources,
            or in none.
    """
    weights = _read(path)
    with_source = any(isinstance(key, tuple) for key in weights)
    owners: dict[_Key, tuple[Path, str]] = {}  # of each key that names a document: its folder and source
    selection: dict[Path, list[NDArray[np.float32]]] = {}
    for folder in folders:
        selection[folder] = []
        for documents in _documents(folder, "train"):
            factors = np.ones(len(documents), np.float32)
            for i, (source, name) in enumerate(documents):
                for key in (name, (source, name)) if with_source else (name,):
                    if (weight := weights.get(key)) is None:
                        continue
                    other = owners.setdefault(key, (folder, source))
                    if other != (folder, source):
                        raise UserError(
                            f"{path} names {name!r}, which is in two sources, {other[1]!r} and {source!r}: "
                            'add the one that is meant to the line, as "source"'
                        )
                    if key != name and weights.get(name, weight) != weight:
                        raise _two_weights(path, name)
                    factors[i] = weight
            selection[folder].append(factors)
    _check_known(path, [key for key in weights if key not in owners], folders)
    return selection


def selection_fingerprint(selection: Selection) -> str:
    """16 hex digits that change with what any document weighs, and with nothing else.

    The order of the file's lines and its format don't count; the shards have a fingerprint of their own.
    """
    digest = hashlib.blake2b(digest_size=8)
    for shards in selection.values():
        for factors in shards:
            digest.update(factors.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[_Key, float]:
    """What the lines or rows say."""
    weights: dict[_Key, float] = {}
    try:
        for place, name, weight, source in (_parquet if path.suffix == ".parquet" else _jsonl)(path):
            known = isinstance(name, str) and isinstance(source, str | None)
            if not known or type(weight) not in (int, float) or not 0 <= weight <= _LARGEST:
                raise UserError(
                    f'{path}:{place} has no name as "document" and number from 0 on as "weight", as in '
                    '{"document": "a.txt", "weight": 0.5}'
                )
            key = name if source is None else (source, name)
            if weights.setdefault(key, float(weight)) != weight:
                raise _two_weights(f"{path}:{place}", name)
    except OSError as error:
        raise UserError(f"data.selection: {path} can't be read: {error.strerror or error}") from None
    return weights


def _jsonl(path: Path) -> Iterator[tuple[int, Any, Any, Any]]:
    """Line number, document, weight and source of each line; None for what it lacks."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                if not line.strip():
                    continue
                entry = None
            if isinstance(entry, dict):
                yield number, entry.get("document"), entry.get("weight"), entry.get("source")
            else:
                yield number, None, None, None


def _parquet(path: Path) -> Iterator[tuple[int, Any, Any, Any]]:
    """The same of each row."""
    names = ["document", "weight", "source"]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install -e '.[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(path).read(columns=names)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is damaged, or no Parquet file: {error}") from None
    missing = [None] * len(table)
    columns = (table[name].to_pylist() if name in table.column_names else missing for name in names)
    return zip(range(1, len(table) + 1), *columns, strict=True)


def _documents(folder: Path, split: Split) -> Iterator[list[tuple[str, str]]]:
    """Source and name of each document of a split, shard by shard."""
    index = read_index(folder)
    for number, counts in enumerate(shard[split] for shard in index["shards"]):
        path = shard_folder(folder, number)
        try:
            lines = (path / split / "names.jsonl").read_text("utf-8").splitlines()
            names = json.loads(f"[{','.join(lines)}]")
            sources = [index["sources"][i] for i in np.load(path / split / "sources.npy").tolist()]
            documents = list(zip(sources, names, strict=True))
        except (OSError, ValueError):
            documents = []
        if len(documents) != counts["documents"]:
            raise UserError(
                f"the names of the documents in {path} are damaged: remove that folder and run the same "
                "command again, which makes that shard anew"
            )
        yield documents


def _check_known(path: Path, keys: list[_Key], folders: Sequence[Path]) -> None:
    """Of `keys`, which name no training document, each must name a held-out one.

    One that names nothing is always an error: the document it was meant for would silently be trained on.
    """
    unknown = dict.fromkeys(keys)
    for folder in folders if unknown else ():
        for source, name in itertools.chain.from_iterable(_documents(folder, "heldout")):
            unknown.pop(name, None)
            unknown.pop((source, name), None)
    if unknown:
        first = next(iter(unknown))
        shown = repr(first) if isinstance(first, str) else f"{first[1]!r} of {first[0]!r}"
        raise UserError(
            f"{path} names {len(unknown):,} documents that are in none of the sources, the first of them "
            f"{shown}: correct or remove these lines; the names are in {folders[0]}/*/train/names.jsonl"
        )
    if keys:
        _log.info("%s: %s of its documents are held out and stay so", path, f"{len(keys):,}")


def _two_weights(where: Path | str, name: str) -> UserError:
    return UserError(f"{where}: {name!r} is named with two weights: keep one line of each document")
