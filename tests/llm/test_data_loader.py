"""Batches: against a naive reference, every token once, any host count, any history."""

from __future__ import annotations

import json
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.loader import Batch, TokenDataset, heldout_batches, open_dataset, train_batch

VOCABULARY = 1000


def write_shards(
    folder: Path, shards: list[list[list[int]]], weights: list[list[float]] | None = None
) -> Path:
    """Token shards as `build_shards` lays them out: shards of documents of token ids."""
    entries = []
    for number, documents in enumerate(shards):
        path = folder / f"{number:05d}" / "train"
        path.mkdir(parents=True)
        np.save(path / "tokens.npy", np.array([t for d in documents for t in d], np.uint16))
        np.save(path / "starts.npy", np.cumsum([0, *map(len, documents)], dtype=np.int64))
        np.save(
            path / "weights.npy", np.array(weights[number] if weights else [1.0] * len(documents), np.float32)
        )
        counts = {"documents": len(documents), "tokens": sum(map(len, documents)), "bytes": 0}
        entries.append({"train": counts})
    index = {"format": 1, "vocab_size": VOCABULARY, "shards": entries}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def stream(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Shards of documents whose tokens are 0, 1, 2, ... over all."""
    token = count()
    return [[[next(token) for _ in range(length)] for length in shard] for shard in lengths]


def naive(
    shards: list[list[list[int]]], weights: list[list[float]], length: int, window: int
) -> dict[str, list]:
    """One window, token by token."""
    documents = zip(chain(*shards), chain(*weights), count(), strict=False)
    flat = [(token, number, weight) for tokens, weight, number in documents for token in tokens]
    piece = flat[window * length : window * length + length + 1]
    row: dict[str, list] = {name: [] for name in Batch._fields}
    segment, position, previous = 0, 0, None
    for t in range(length):
        here = piece[t] if t < len(piece) else None
        there = piece[t + 1] if t + 1 < len(piece) else None
        document = here[1] if here else -1
        segment, position = (segment, position + 1) if document == previous else (segment + 1, 0)
        previous = document
        row["tokens"].append(here[0] if here else 0)
        row["targets"].append(there[0] if there else 0)
        row["segment_ids"].append(segment if here else 0)
        row["positions"].append(position)
        row["weights"].append(there[2] if here and there and here[1] == there[1] else 0.0)
    return row


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 12))
def test_windows_are_those_of_a_naive_reference(tmp_path_factory, data, length):
    lengths = data.draw(st.lists(st.lists(st.integers(2, 9), max_size=4), min_size=1, max_size=5).filter(any))
    shards = stream(lengths)
    weights = [[data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for _ in shard] for shard in lengths]
    dataset = open_dataset([write_shards(tmp_path_factory.mktemp("naive"), shards, weights)], "train", length)
    rows = [
        {name: array[row].tolist() for name, array in batch._asdict().items()}
        for batch in heldout_batches(dataset, 3)
        for row in range(3)
    ]
    total = sum(map(sum, lengths))
    assert dataset.num_windows == -(-(total - 1) // length)
    for window, row in enumerate(rows):
        expected = naive(shards, weights, length, window) if window < dataset.num_windows else None
        if expected:
            assert row == expected
        else:
            assert not any(row["weights"]) and not any(row["segment_ids"]) and not any(row["tokens"])


def test_a_batch_by_hand(tmp_path):
    shards = [[[1, 10, 11, 2], [1, 20, 2]], [[1, 30, 31, 32, 2]]]
    dataset = open_dataset([write_shards(tmp_path, shards, [[1, 0.5], [2]])], "train", 6)
    (batch,) = heldout_batches(dataset, 2)
    assert batch.tokens.tolist() == [[1, 10, 11, 2, 1, 20], [2, 1, 30, 31, 32, 2]]
    assert batch.targets.tolist() == [[10, 11, 2, 1, 20, 2], [1, 30, 31, 32, 2, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0.5, 0.5], [0, 2, 2, 2, 2, 0]]
    assert [array.dtype for array in batch] == [np.int32] * 4 + [np.float32]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    generator = np.random.default_rng(0)
    lengths = [generator.integers(2, 40, generator.integers(0, 6)).tolist() for _ in range(12)]
    return open_dataset([write_shards(tmp_path_factory.mktemp("dataset"), stream(lengths))], "train", 8)


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def counted(dataset: TokenDataset, batches) -> np.ndarray:
    """How often each token of the stream, whose id is its place there, was a target."""
    counts = np.zeros(dataset.num_tokens, int)
    for batch in batches:
        np.add.at(counts, batch.targets[(batch.segment_ids > 0) & (batch.targets > 0)], 1)
    return counts


def test_every_token_is_a_target_once_an_epoch(dataset):
    expected = np.array([0] + [1] * (dataset.num_tokens - 1))
    assert np.array_equal(counted(dataset, heldout_batches(dataset, 5)), expected)
    epoch = [train_batch(dataset, step, 1, 7) for step in range(dataset.num_windows)]
    assert np.array_equal(counted(dataset, epoch), expected)
    batches = [train_batch(dataset, step, 6, 7) for step in range(dataset.num_windows)]  # six epochs
    assert np.array_equal(counted(dataset, batches), 6 * expected)


def test_only_the_first_token_of_a_document_is_not_predicted(dataset):
    weight = sum(batch.weights.sum() for batch in heldout_batches(dataset, 4))
    assert weight == dataset.num_tokens - dataset.first_document[-1]


def test_a_limit_spreads_batches_over_all_windows(dataset):
    every = list(heldout_batches(dataset, 2))
    for limit in range(1, len(every) + 2):
        kept = list(heldout_batches(dataset, 2, limit=limit))
        places = [i for i, batch in enumerate(every) if any(same(batch, other) for other in kept)]
        assert len(kept) == len(places) == min(limit, len(every))
        gaps = np.diff([*places, len(every)])
        assert places[0] == 0 and gaps.max() - gaps.min() <= 1


def test_the_order_differs_by_epoch_and_seed(dataset):
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        steps = range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows)
        return tuple(int(train_batch(dataset, step, 1, seed).tokens[0, 0]) for step in steps)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6 and len({tuple(sorted(o)) for o in orders}) == 1


def test_hosts_share_the_global_batch(dataset):
    whole = train_batch(dataset, 11, 8, 3)
    for hosts in (1, 2, 4, 8):
        size = 8 // hosts
        parts = [train_batch(dataset, 11, 8, 3, slice(h * size, (h + 1) * size)) for h in range(hosts)]
        assert same(Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), whole)
    held = list(heldout_batches(dataset, 4))
    halves = [list(heldout_batches(dataset, 4, slice(h, h + 2))) for h in (0, 2)]
    for batch, *parts in zip(held, *halves, strict=True):
        assert same(Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), batch)


def test_a_batch_does_not_depend_on_history(dataset):
    forward = [train_batch(dataset, step, 4, 0) for step in range(30)]
    for step in reversed(range(30)):
        assert same(train_batch(dataset, step, 4, 0), forward[step])


def test_a_batch_size_cuts_the_same_order(dataset):
    ones = [train_batch(dataset, step, 1, 0).tokens[0].tolist() for step in range(24)]
    sixes = [row for step in range(4) for row in train_batch(dataset, step, 6, 0).tokens.tolist()]
    assert ones == sixes


def test_a_corpus_smaller_than_a_window_is_padded(tmp_path):
    dataset = open_dataset([write_shards(tmp_path, [[[5, 6, 7]]])], "train", 8)
    batch = train_batch(dataset, 0, 2, 0)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]] * 2
    assert batch.weights.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_weights_can_be_rewritten(tmp_path):
    folder = write_shards(tmp_path, stream([[4, 5], [6]]))
    assert sum(batch.weights.sum() for batch in heldout_batches(open_dataset([folder], "train", 4), 2)) == 12
    np.save(folder / "00000" / "train" / "weights.npy", np.array([0, 2], np.float32))
    assert sum(batch.weights.sum() for batch in heldout_batches(open_dataset([folder], "train", 4), 2)) == 13
