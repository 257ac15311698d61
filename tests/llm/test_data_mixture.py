"""Mixtures: exact shares, each window once an epoch of its dataset, random access."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same_batch, stream, write_shards

from llm.data.loader import Batch, Mixture, TokenDataset, heldout_batches, open_dataset, train_batch
from llm.data.mixture import deal

some_weights = st.lists(st.floats(1e-4, 1), min_size=1, max_size=9).map(lambda w: np.array(w) / sum(w))


@given(weights=some_weights)
def test_before_any_slot_each_dataset_has_had_its_share(weights):
    dataset, place = deal(np.arange(3000), weights)
    dealt = np.cumsum(dataset[:, None] == np.arange(len(weights)), axis=0)
    assert np.array_equal(place, dealt[np.arange(3000), dataset] - 1)  # 0, 1, 2, ... in each
    off = np.abs(dealt - np.arange(1, 3001)[:, None] * weights)
    halvings = (len(weights) - 1).bit_length()
    assert off.max() <= halvings / 2 + 1e-6


@given(weights=some_weights, slots=st.lists(st.integers(0, 3000), min_size=1))
def test_a_slot_goes_where_it_goes_whatever_it_is_asked_with(weights, slots):
    whole = deal(np.arange(3001), weights)
    for together, alone in zip(whole, deal(np.array(slots), weights), strict=True):
        assert np.array_equal(together[slots], alone)


def test_shares_hold_far_out():
    weights = np.array([0.7, 0.29, 0.01])
    dataset, place = deal(np.arange(10**12, 10**12 + 1000), weights)
    counts = np.bincount(dataset)
    assert np.abs(counts - weights * 1000).max() <= 2
    for i, weight in enumerate(weights):
        assert abs(place[dataset == i][0] - weight * 10**12) <= 2


def test_it_stays_as_it_is():
    """Another order would change every run that is resumed."""
    assert deal(np.arange(10), np.array([0.5, 0.3, 0.2]))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def of_lengths(folder, *lengths: list[int], first: int) -> TokenDataset:
    """Documents whose tokens are `first`, `first` + 1, ... over all."""
    shards = [[[first + t for t in d] for d in shard] for shard in stream(list(lengths))]
    return open_dataset([write_shards(folder, shards)], "train", 8)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> tuple[TokenDataset, ...]:
    folders = [tmp_path_factory.mktemp("mixture") for _ in range(3)]
    return (
        of_lengths(folders[0], [30, 51], [7], first=0),
        of_lengths(folders[1], [17], [9, 120], first=10_000),
        of_lengths(folders[2], [20], first=20_000),
    )


WEIGHTS = (0.5, 0.375, 0.125)


@pytest.fixture(scope="module")
def mixture(datasets) -> Mixture:
    return Mixture(datasets, WEIGHTS)


def test_sizes_add_up(mixture, datasets):
    assert mixture.num_tokens == sum(dataset.num_tokens for dataset in datasets) == 88 + 146 + 20
    assert mixture.num_windows == 11 + 19 + 3


def test_every_batch_has_the_shares_of_the_weights(mixture):
    for step in range(50):
        first = train_batch(mixture, step, 16, 5).tokens[:, 0] // 10_000
        assert np.bincount(first).tolist() == [8, 6, 2]


def test_each_dataset_goes_through_its_epochs(mixture, datasets):
    steps = [train_batch(mixture, step, 16, 5).tokens for step in range(40)]
    firsts = np.concatenate(steps)[:, 0]
    orders = []
    for i, dataset in enumerate(datasets):
        own = firsts[firsts // 10_000 == i]
        epochs = [own[e : e + dataset.num_windows] for e in range(0, len(own), dataset.num_windows)][:-1]
        every = sorted(batch.tokens[0, 0] for batch in heldout_batches(dataset, 1))
        assert len(epochs) >= 10 and all(sorted(epoch) == every for epoch in epochs)
        orders += [tuple(np.argsort(epoch)) for epoch in epochs if i < 2]
    assert len(set(orders)) == len(orders)


def test_each_dataset_comes_in_the_order_it_has_alone(mixture, datasets):
    rows = np.concatenate([train_batch(mixture, step, 4, 5).tokens for step in range(9)])
    alone = np.concatenate([train_batch(datasets[0], step, 4, 5).tokens for step in range(9)])
    own = rows[rows[:, 0] < 10_000]
    assert np.array_equal(own, alone[: len(own)])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_datasets_of_one_size_have_orders_of_their_own(datasets, seed):
    twice = Mixture((datasets[1], datasets[1]), (0.5, 0.5))
    rows = np.concatenate([train_batch(twice, step, 2, seed).tokens[:, 0] for step in range(19)])
    assert Counter(rows[::2]) == Counter(rows[1::2]) and not np.array_equal(rows[::2], rows[1::2])
    neighbor = np.concatenate([train_batch(twice, step, 2, (seed + 1) % 2**32).tokens for step in range(19)])
    assert not np.array_equal(rows[1::2], neighbor[::2, 0])


def test_one_dataset_is_that_dataset(datasets):
    for step in range(20):
        assert same_batch(
            train_batch(Mixture((datasets[1],), (1.0,)), step, 5, 3), train_batch(datasets[1], step, 5, 3)
        )


@settings(max_examples=20)
@given(step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1), hosts=st.sampled_from([2, 4, 8]))
def test_hosts_share_the_global_batch_at_any_step(mixture, step, seed, hosts):
    size = 8 // hosts
    parts = [train_batch(mixture, step, 8, seed, slice(h * size, (h + 1) * size)) for h in range(hosts)]
    whole = Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    assert same_batch(whole, train_batch(mixture, step, 8, seed))


def test_a_selection_changes_its_dataset_alone(tmp_path, datasets):
    folder = write_shards(tmp_path, [[[20_000, 20_001, 20_002]], stream([[20, 30]])[0]])
    factors = {folder: [np.array([1], np.float32), np.zeros(2, np.float32)]}
    mixture = Mixture((datasets[0], open_dataset([folder], "train", 8, factors)), (0.75, 0.25))
    batch = train_batch(mixture, 3, 8, 0)
    selected = batch.tokens[:, 0] == 20_000
    assert selected.sum() == 2 and not np.any(batch.tokens[selected, 3:])
