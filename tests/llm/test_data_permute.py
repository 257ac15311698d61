"""The keyed permutation: a bijection, different for each seed and epoch, without a pattern."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.permute import permute


def permutation(size: int, seed: int, epoch: int, count: int | None = None) -> np.ndarray:
    index = np.arange(count or size)
    return permute(index, size, seed, np.full(len(index), epoch))


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_it_is_a_bijection(size, seed, epoch):
    assert np.array_equal(np.sort(permutation(size, seed, epoch)), np.arange(size))


@given(size=st.integers(1, 2**48), seed=st.integers(0, 2**32), data=st.data())
def test_an_index_goes_to_one_place_whatever_it_is_asked_with(size, seed, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    epochs = data.draw(st.lists(st.integers(0, 5), min_size=len(index), max_size=len(index)))
    together = permute(np.array(index), size, seed, np.array(epochs))
    alone = [
        int(permute(np.array([i]), size, seed, np.array([e]))[0]) for i, e in zip(index, epochs, strict=True)
    ]
    assert together.tolist() == alone
    assert all(0 <= place < size for place in alone)


@given(sizes=st.lists(st.integers(1, 2**52), min_size=1, max_size=20), data=st.data())
def test_indices_may_have_sizes_of_their_own(sizes, data):
    index = np.array([data.draw(st.integers(0, size - 1)) for size in sizes])
    epoch = np.arange(len(sizes))
    alone = [permute(index[i : i + 1], size, 5, epoch[i : i + 1])[0] for i, size in enumerate(sizes)]
    assert permute(index, np.array(sizes), 5, epoch).tolist() == alone


def test_no_two_orders_are_alike():
    orders = [tuple(permutation(1000, seed, epoch)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100
    shared = [np.mean(np.equal(a, b)) for a, b in itertools.combinations(orders, 2)]
    assert np.mean(shared) == pytest.approx(1 / 1000, rel=0.3)


def test_it_stays_as_it_is():
    """Another order would change every run that is resumed."""
    assert permutation(10, 0, 0).tolist() == [5, 3, 4, 2, 8, 9, 6, 0, 1, 7]
    assert permutation(10**12, 7, 3, 3).tolist() == [293116713336, 372339412860, 978240521920]


@pytest.mark.parametrize("size", [3000, 66_000, 10**6, 4 * 10**6, 10**9, 2**32 - 2, 10**12])
def test_neighbors_scatter(size):
    """At these sizes Grain's shuffle was seen to keep neighbors close: a correlation of 0.3 to 0.8."""
    count = min(size, 8192)
    for seed, epoch in itertools.product(range(3), range(2)):
        places = permutation(size, seed, epoch, count) / size
        for step in (1, 2, 16):
            assert abs(np.corrcoef(places[:-step], places[step:])[0, 1]) < 5 / count**0.5
        next_epoch = permutation(size, seed, epoch + 1, count) / size
        assert abs(np.corrcoef(places, next_epoch)[0, 1]) < 5 / count**0.5
        counts = np.histogram(places, 16, (0, 1))[0]
        assert ((counts - count / 16) ** 2 / (count / 16)).sum() < 50  # chi-square, 15 degrees of freedom


def test_small_orders_come_equally_often():
    orders = Counter(tuple(permutation(4, seed, epoch)) for seed in range(60) for epoch in range(40))
    counts = np.array(list(orders.values()))
    assert len(orders) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 60  # chi-square, 23 degrees of freedom
