"""Batches as a function of (seed, step), from token shards that are mapped into memory.

The documents of a split, end to end, are one stream of tokens. Window w is its tokens w * S to
w * S + S, so that every token but the first is a target in exactly one window; the last window is padded.
Each epoch takes the windows in an order of its own (`permute`), and step s takes the next `batch_size` of
them: no state, and the same order however many hosts share a batch. A `Mixture` deals the places of a batch
to several such streams (`deal`), each of which goes through its epochs at its own pace.
"""

from __future__ import annotations

import functools
import json
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from core.errors import UserError
from llm.data.corpus import Split
from llm.data.mixture import deal
from llm.data.permute import permute
from llm.data.shards import FORMAT, shard_folder

if TYPE_CHECKING:
    Array = Any  # NumPy's from the loader, JAX's inside a step

# Of each folder and each shard in it: what to multiply the weight of each training document [D] by; 0 drops
# it. `read_selection` makes it.
Selection = Mapping[Path, Sequence[NDArray[np.float32]]]

_NPY_HEADER = 128  # bytes before the values of a one-dimensional array


class Batch(NamedTuple):
    """B windows of S tokens: NumPy from the loader, JAX arrays inside a step.

    Documents in a window are numbered 1, 2, ...; 0 is padding. Positions restart with each document. A
    weight is 0 where the target begins another document or is padding, else the document's own. Segment ids
    are None where documents are not kept apart (`across_documents`).
    """

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None
    positions: Int[Array, "B S"]
    weights: Float[Array, "B S"]


def across_documents(batch: Batch) -> Batch:
    """The same windows, each read as one text: positions run on, and tokens see earlier documents.

    So GPT-2 and Llama 2 were trained. Targets and weights stay: the first token of a document follows every
    end of a text, so there is nothing to learn from it, and losses are of the same tokens either way. Padding
    comes last in a window, where no token sees it.
    """
    positions = np.broadcast_to(np.arange(batch.tokens.shape[1], dtype=np.int32), batch.tokens.shape)
    return batch._replace(segment_ids=None, positions=positions)


class Shard(NamedTuple):
    """The documents of a shard that are kept, end to end."""

    tokens: NDArray  # [T] of all documents
    starts: NDArray[np.int64]  # [D + 1] where each kept document starts among the kept ones' tokens
    shifts: NDArray[np.int64]  # [D] how much further back it starts in `tokens`
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
        return max(0, -(-(self.num_tokens - 1) // self.sequence_length))

    def windows(self, place: NDArray[np.int64], seed: int) -> list[Window]:
        """The windows at some places of an endless run over the epochs."""
        epoch, within = np.divmod(place, self.num_windows)
        order = permute(within, self.num_windows, seed, epoch)
        return [Window(self, number) for number in order.tolist()]


class Window(NamedTuple):
    """Tokens `number * S` to `number * S + S` of a dataset; from `num_windows` on, padding."""

    dataset: TokenDataset
    number: int


@dataclass(frozen=True)
class Mixture:
    """Datasets to train on at one time.

    A weight is the share of all windows that come from its dataset: positive, and together 1.
    """

    datasets: Sequence[TokenDataset]
    weights: Sequence[float]

    @property
    def num_tokens(self) -> int:
        return sum(dataset.num_tokens for dataset in self.datasets)

    @property
    def num_windows(self) -> int:
        return sum(dataset.num_windows for dataset in self.datasets)

    def windows(self, place: NDArray[np.int64], seed: int) -> list[Window]:
        """The windows at some places of an endless run."""
        number, place = deal(place, np.array(self.weights, np.float64))
        sizes = np.array([dataset.num_windows for dataset in self.datasets])[number]
        epoch, within = np.divmod(place, sizes)
        # What is added to the epoch gives each dataset orders of its own; nothing is added for the first.
        order = permute(within, sizes, seed, epoch + (number << 32))
        pairs = zip(number.tolist(), order.tolist(), strict=True)
        return [Window(self.datasets[i], window) for i, window in pairs]


def open_dataset(
    folders: Sequence[Path], split: Split, sequence_length: int, selection: Selection | None = None
) -> TokenDataset:
    """Open what `build_shards` made, as one stream in the order of `folders`.

    Of a training split, only the documents that `selection` keeps are in the stream. The held-out split is
    always whole.

    Raises:
        UserError: for shards that are incomplete, damaged, or of another format; for a selection that drops
            everything.
    """
    shards: list[tuple[Path, NDArray[np.float32] | None]] = []
    counts: list[dict[str, int]] = []
    sources: dict[str, None] = {}
    for folder in folders:
        index = read_index(folder)
        sources |= dict.fromkeys(index["sources"])
        token_bytes = 2 if index["vocab_size"] <= 2**16 else 4
        for number, shard in enumerate(index["shards"]):
            path, count = shard_folder(folder, number) / split, shard[split]
            _check(path, count, token_bytes)
            factors = None
            if selection is not None and split == "train":
                factors = selection[folder][number]
                count = _count_kept(path, factors)
            shards.append((path, factors))
            counts.append(count)
    first_token, first_document = (
        np.cumsum([0, *(count[key] for count in counts)], dtype=np.int64) for key in ("tokens", "documents")
    )
    if selection is not None and split == "train" and first_token[-1] < 2:
        raise UserError(
            f"data.selection drops every document of {', '.join(map(repr, sources))}: remove these sources, "
            "or keep some of their documents"
        )
    num_bytes = sum(count["bytes"] for count in counts)
    # Mappings are kept, but not all: each of a shard's three holds a file open, often one of 1,024 at most.
    kept = max(4, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 32))
    open_shard = functools.lru_cache(maxsize=kept)(lambda number: _open_shard(*shards[number]))
    return TokenDataset(split, sequence_length, first_token, first_document, num_bytes, open_shard)


def read_index(folder: Path) -> dict[str, Any]:
    """What `build_shards` says is in `folder`.

    Raises:
        UserError: for an index that is missing or damaged, or shards of another format.
    """
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


def train_batch(
    data: TokenDataset | Mixture, step: int, batch_size: int, seed: int, rows: slice = slice(None)
) -> Batch:
    """The batch of `step`, of which this host needs `rows`."""
    return _assemble(data.windows(step * batch_size + np.arange(batch_size)[rows], seed))


def heldout_batches(
    dataset: TokenDataset, batch_size: int, rows: slice = slice(None), limit: int | None = None
) -> Iterator[Batch]:
    """All windows once, in order; rows that are left over in the last batch are padding.

    Of more than `limit` batches, that many, spread evenly.
    """
    for number in spread(-(-dataset.num_windows // batch_size), limit):
        windows = number * batch_size + np.arange(batch_size)[rows]
        yield _assemble([Window(dataset, window) for window in windows.tolist()])


def spread(count: int, limit: int | None) -> list[int]:
    """0 to `count` - 1, or `limit` of these numbers at even distances."""
    kept = count if limit is None else min(count, limit)
    return [i * count // kept for i in range(kept)]


def _assemble(windows: list[Window]) -> Batch:
    length = windows[0].dataset.sequence_length
    pieces = [piece for window in windows for piece in _pieces(*window)]
    tokens, lengths, documents, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    shape = (len(windows), length + 1)
    tokens = tokens.astype(np.int32).reshape(shape)
    documents = np.repeat(documents, lengths).reshape(shape)
    weights = np.repeat(weights, lengths).reshape(shape)

    inputs, targets = documents[:, :-1], documents[:, 1:]
    place = np.arange(length, dtype=np.int32)
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
        start, stop = begin - offset, min(end - offset, int(shard.starts[-1]))
        first, last = int(shard.starts.searchsorted(start, "right")) - 1, int(shard.starts.searchsorted(stop))
        edges = shard.starts[first : last + 1].copy()
        edges[0], edges[-1] = start, stop
        lengths, shifts = edges[1:] - edges[:-1], shard.shifts[first:last]
        documents = np.arange(first, last) + dataset.first_document[number]
        yield _tokens(shard, start, stop, lengths, shifts), lengths, documents, shard.weights[first:last]
        begin, number = offset + stop, number + 1
    if padding:
        yield np.zeros(padding, np.uint16), np.array([padding]), np.array([-1]), np.zeros(1, np.float32)


def _tokens(
    shard: Shard, start: int, stop: int, lengths: NDArray[np.int64], shifts: NDArray[np.int64]
) -> NDArray:
    """Tokens `start` to `stop` of the kept ones, which are `lengths` of some documents."""
    if not len(shifts) or shifts[0] == shifts[-1]:  # nothing is dropped between them
        shift = int(shifts[0]) if len(shifts) else 0
        return shard.tokens[start + shift : stop + shift]
    return shard.tokens[np.arange(start, stop) + np.repeat(shifts, lengths)]


def _open_shard(path: Path, factors: NDArray[np.float32] | None) -> Shard:
    """The split of a shard in `path`, without the documents whose factor [D] is 0."""
    tokens, starts, weights = (_column(path, name) for name in ("tokens", "starts", "weights"))
    if factors is None:
        return Shard(tokens, starts, np.broadcast_to(np.int64(0), len(weights)), weights)
    kept = np.flatnonzero(factors)
    begins, lengths = starts[kept], starts[kept + 1] - starts[kept]
    kept_starts = np.concatenate([[0], np.cumsum(lengths)])
    return Shard(tokens, kept_starts, begins - kept_starts[:-1], weights[kept] * factors[kept])


def _count_kept(path: Path, factors: NDArray[np.float32]) -> dict[str, int]:
    kept = factors > 0
    tokens, sizes = np.diff(_column(path, "starts")), _column(path, "bytes")
    return {
        "documents": int(kept.sum()),
        "tokens": int(tokens[kept].sum()),
        "bytes": int(sizes[kept].sum(dtype=np.int64)),
    }


def _column(path: Path, name: str) -> NDArray:
    return np.asarray(np.load(path / f"{name}.npy", mmap_mode="r"))


def _check(folder: Path, count: dict[str, int], token_bytes: int) -> None:
    """Compare sizes: whoever opens a dataset learns now, not in a week, that a file is cut short."""
    documents = count["documents"]
    columns = {
        "tokens": count["tokens"] * token_bytes,
        "starts": 8 * (documents + 1),
        "weights": 4 * documents,
        "bytes": 4 * documents,
    }
    for name, size in columns.items():
        path = folder / f"{name}.npy"
        found = path.stat().st_size if path.exists() else 0
        if found != _NPY_HEADER + size:
            raise UserError(
                f"{path} is damaged ({found} bytes instead of {_NPY_HEADER + size}): remove the folder "
                f"{folder.parent} and run the same command again, which makes that shard anew"
            )
