"""Batches as a function of (seed, step), from token shards that are mapped into memory.

The documents of a split, end to end, are one stream of tokens. Window w is its tokens w * S to
w * S + S, so that every token but the first is a target in exactly one window; the last window is padded.
Each epoch takes the windows in an order of its own (`permute`), and step s takes the next `batch_size` of
them: no state, and the same order however many hosts share a batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from core.errors import UserError
from llm.data.corpus import Split
from llm.data.permute import permute
from llm.data.shards import FORMAT, shard_folder

if TYPE_CHECKING:
    Array = Any  # NumPy's from the loader, JAX's inside a step

_NPY_HEADER = 128  # bytes before the values of a one-dimensional array


class Batch(NamedTuple):
    """B windows of S tokens: NumPy from the loader, JAX arrays inside a step.

    Documents in a window are numbered 1, 2, ...; 0 is padding. Positions restart with each document. A
    weight is 0 where the target begins another document or is padding, else the document's own.
    """

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    weights: Float[Array, "B S"]


class Shard(NamedTuple):
    tokens: NDArray  # [T]
    starts: NDArray[np.int64]  # [D + 1]
    weights: NDArray[np.float32]  # [D]


@dataclass(frozen=True)
class TokenDataset:
    """One split of the shards in some folders, seen as one stream. `open_dataset` makes it."""

    split: Split
    sequence_length: int
    first_token: NDArray[np.int64]  # [shards + 1] where each shard starts in the stream; last: num_tokens
    first_document: NDArray[np.int64]  # [shards + 1]
    num_bytes: int  # of UTF-8 text
    open_shard: Callable[[int], Shard]

    @property
    def num_tokens(self) -> int:
        return int(self.first_token[-1])

    @property
    def num_windows(self) -> int:
        return -(-(self.num_tokens - 1) // self.sequence_length)


def open_dataset(folders: Sequence[Path], split: Split, sequence_length: int) -> TokenDataset:
    """Open what `build_shards` made, as one stream in the order of `folders`.

    Raises:
        UserError: for shards that are incomplete, damaged, or of another format.
    """
    shards: list[Path] = []
    counts: list[dict[str, int]] = []
    for folder in folders:
        index = _read_index(folder)
        for number, shard in enumerate(index["shards"]):
            shards.append(shard_folder(folder, number))
            counts.append(shard[split])
            _check(shards[-1], split, counts[-1], 2 if index["vocab_size"] <= 2**16 else 4)
    first_token, first_document = (
        np.cumsum([0, *(count[key] for count in counts)], dtype=np.int64) for key in ("tokens", "documents")
    )
    num_bytes = sum(count["bytes"] for count in counts)
    # Mappings are kept, but not all: an operating system allows some 65,000.
    open_shard = functools.lru_cache(maxsize=4096)(lambda number: _open_shard(shards[number], split))
    return TokenDataset(split, sequence_length, first_token, first_document, num_bytes, open_shard)


def train_batch(
    dataset: TokenDataset, step: int, batch_size: int, seed: int, rows: slice = slice(None)
) -> Batch:
    """The batch of `step`, of which this host needs `rows`."""
    place = step * batch_size + np.arange(batch_size)[rows]
    epoch, within = np.divmod(place, dataset.num_windows)
    return _assemble(dataset, permute(within, dataset.num_windows, seed, epoch))


def heldout_batches(
    dataset: TokenDataset, batch_size: int, rows: slice = slice(None), limit: int | None = None
) -> Iterator[Batch]:
    """All windows once, in order; rows that are left over in the last batch are padding.

    Of more than `limit` batches, that many, spread evenly.
    """
    for number in spread(-(-dataset.num_windows // batch_size), limit):
        yield _assemble(dataset, number * batch_size + np.arange(batch_size)[rows])


def spread(count: int, limit: int | None) -> list[int]:
    """0 to `count` - 1, or `limit` of these numbers at even distances."""
    kept = count if limit is None else min(count, limit)
    return [i * count // kept for i in range(kept)]


def _assemble(dataset: TokenDataset, windows: NDArray[np.int64]) -> Batch:
    """Windows [B] as a batch; one from `num_windows` on is padding."""
    pieces = [piece for window in windows.tolist() for piece in _pieces(dataset, window)]
    tokens, lengths, documents, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    shape = (len(windows), dataset.sequence_length + 1)
    tokens = tokens.astype(np.int32).reshape(shape)
    documents = np.repeat(documents, lengths).reshape(shape)
    weights = np.repeat(weights, lengths).reshape(shape)

    inputs, targets = documents[:, :-1], documents[:, 1:]
    place = np.arange(dataset.sequence_length, dtype=np.int32)
    begins = np.ones_like(inputs, dtype=bool)
    np.not_equal(inputs[:, 1:], inputs[:, :-1], out=begins[:, 1:])
    real = inputs >= 0
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=((inputs - inputs[:, :1] + 1) * real).astype(np.int32),
        positions=place - np.maximum.accumulate(place * begins, axis=1),
        weights=weights[:, 1:] * (real & (inputs == targets)),
    )


def _pieces(dataset: TokenDataset, window: int) -> Iterator[tuple[NDArray, ...]]:
    """The parts of a window [S + 1] in one shard each, and its padding.

    Of each part: its tokens; how many belong to each document; these documents' numbers in the stream, -1
    for padding; and their weights.
    """
    length = dataset.sequence_length + 1
    begin = min(window * dataset.sequence_length, dataset.num_tokens)
    end = min(begin + length, dataset.num_tokens) if window < dataset.num_windows else begin
    padding = length - (end - begin)
    number = int(dataset.first_token.searchsorted(begin, "right")) - 1
    while begin < end:
        shard, offset = dataset.open_shard(number), int(dataset.first_token[number])
        start, stop = begin - offset, min(end - offset, len(shard.tokens))
        first, last = int(shard.starts.searchsorted(start, "right")) - 1, int(shard.starts.searchsorted(stop))
        edges = shard.starts[first : last + 1].copy()
        edges[0], edges[-1] = start, stop
        documents = np.arange(first, last) + dataset.first_document[number]
        yield shard.tokens[start:stop], edges[1:] - edges[:-1], documents, shard.weights[first:last]
        begin, number = offset + stop, number + 1
    if padding:
        yield np.zeros(padding, np.uint16), np.array([padding]), np.array([-1]), np.zeros(1, np.float32)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(
            f"{folder}/index.json is missing or damaged: remove it and run the same command again, "
            "which keeps the shards that are finished"
        ) from None
    if index["format"] != FORMAT:
        raise UserError(
            f"{folder} has shards of format {index['format']}, not {FORMAT}: remove it and make them again"
        )
    return index


def _open_shard(folder: Path, split: Split) -> Shard:
    columns = (np.load(folder / split / f"{name}.npy", mmap_mode="r") for name in Shard._fields)
    return Shard(*(np.asarray(column) for column in columns))


def _check(folder: Path, split: Split, count: dict[str, int], token_bytes: int) -> None:
    """Compare sizes: whoever opens a dataset learns now, not in a week, that a file is cut short."""
    documents = count["documents"]
    columns = {
        "tokens": count["tokens"] * token_bytes,
        "starts": 8 * (documents + 1),
        "weights": 4 * documents,
    }
    for name, size in columns.items():
        path = folder / split / f"{name}.npy"
        found = path.stat().st_size if path.exists() else 0
        if found != _NPY_HEADER + size:
            raise UserError(
                f"{path} is damaged ({found} bytes instead of {_NPY_HEADER + size}): remove the folder "
                f"{folder} and run the same command again, which makes that shard anew"
            )
