"""Replay against NumPy, and what the ends of episodes leave in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import replay
from rl.replay import Transition

ITEM = Transition(jnp.zeros(2), jnp.int32(0), jnp.float32(0), jnp.bool_(False), jnp.zeros(2))


def _items(first: int, count: int) -> Transition:
    numbers = jnp.arange(first, first + count, dtype=jnp.float32)
    pairs = numbers[:, None] * jnp.ones(2)
    return Transition(pairs, numbers.astype(jnp.int32), numbers, numbers % 3 == 0, pairs + 1)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_ring_holds_the_newest_items(prioritized, count):
    capacity, held = 10, replay.init(ITEM, 10, prioritized)
    add = jax.jit(replay.add)
    expected: list[int] = []
    for step in range(9):
        held = add(held, _items(step * count, count))
        expected = [*expected, *range(step * count, (step + 1) * count)][-capacity:]
        assert int(replay.size(held)) == len(expected)
        stored = np.asarray(held.ring.experience.action[0])[: len(expected)]
        assert sorted(stored.tolist()) == expected
    drawn = jax.vmap(lambda key: replay.sample(held, key, 10).items)(jax.random.split(jax.random.key(0), 30))
    drawn = Transition(*(value.reshape(300, *value.shape[2:]) for value in drawn))
    assert set(np.asarray(drawn.action).tolist()) == set(expected)
    assert [value.dtype for value in drawn] == [value.dtype for value in ITEM]
    numbers = np.asarray(drawn.action, np.float32)
    np.testing.assert_array_equal(drawn.reward, numbers)
    np.testing.assert_array_equal(drawn.terminated, numbers % 3 == 0)
    np.testing.assert_array_equal(drawn.next_observation, np.stack([numbers + 1] * 2, 1))


def test_uniform_draws_are_uniform_after_wrapping_around():
    held = replay.init(ITEM, 8)
    for step in range(4):
        held = replay.add(held, _items(3 * step, 3))  # 4 to 11 remain
    drawn = np.asarray(replay.sample(held, jax.random.key(1), 8).items.action)
    assert drawn.min() >= 4
    keys = jax.random.split(jax.random.key(2), 2000)
    drawn = np.asarray(jax.vmap(lambda key: replay.sample(held, key, 8).items.action)(keys)).ravel()
    share = np.bincount(drawn, minlength=12)[4:] / drawn.size
    np.testing.assert_allclose(share, 1 / 8, atol=4 * np.sqrt(1 / 8 * 7 / 8 / drawn.size))


def test_prioritized_probabilities_and_weights_match_numpy():
    alpha, beta, capacity = 0.6, 0.4, 6
    held = replay.init(ITEM, capacity, prioritized=True)
    held = replay.add(held, _items(0, 5))
    errors = np.array([0.5, -2.0, 0.0, 3.0], np.float32)
    held = jax.jit(replay.prioritize)(held, jnp.array([0, 1, 2, 3]), jnp.asarray(errors), alpha)
    held = replay.add(held, _items(5, 3))  # items 5 in place 5, 6 and 7 in places 0 and 1
    old = (np.abs(errors) + replay.PRIORITY_OFFSET) ** alpha
    new = max(1.0, old.max())  # what nobody has learned from comes first
    priorities = np.array([new, new, old[2], old[3], 1.0, new])
    probability = priorities / priorities.sum()

    keys = jax.random.split(jax.random.key(3), 4000)
    draw = jax.vmap(lambda key: replay.sample(held, key, 5, beta))
    drawn = draw(keys)
    share = np.bincount(np.asarray(drawn.indices).ravel(), minlength=capacity) / (4000 * 5)
    np.testing.assert_allclose(share, probability, atol=0.01)
    assert share[2] < 0.002
    weights = (capacity * probability[np.asarray(drawn.indices)]) ** -beta
    np.testing.assert_allclose(drawn.weights, weights / weights.max(1, keepdims=True), rtol=1e-5)
    # Strata: the k-th draw of a batch comes from the k-th fifth of the running sum.
    running = np.concatenate([[0], np.cumsum(probability)])
    for k in range(5):
        inside = (running[:-1] < (k + 1) / 5) & (running[1:] > k / 5)
        assert set(np.asarray(drawn.indices)[:, k]) <= set(np.flatnonzero(inside))


def test_the_sums_stay_the_sums_of_the_leaves():
    """Priorities over many orders of magnitude, and leaves that nobody may draw."""
    held_leaves, batch = 600, 64

    def step(carry, key):
        tree, empty = carry
        where, how_much = jax.random.split(key)
        strata = (jnp.arange(batch) + jax.random.uniform(where, (batch,))) / batch
        leaves = replay.find_leaves(tree, strata * tree[1])
        values = jnp.exp(6 * jax.random.normal(how_much, (held_leaves,)))[leaves]
        empty += (tree[len(tree) // 2 + leaves] == 0).sum()
        return (replay.set_leaves(tree, leaves, values), empty), None

    tree = replay.set_leaves(jnp.zeros(2048), jnp.arange(held_leaves), jnp.ones(held_leaves))
    run = jax.jit(lambda tree, keys: jax.lax.scan(step, (tree, 0), keys)[0])
    tree, empty = run(tree, jax.random.split(jax.random.key(4), 2000))
    leaves = np.asarray(tree, np.float64)[1024:]
    assert int(empty) == 0 and leaves[held_leaves:].sum() == 0
    np.testing.assert_allclose(tree[1], leaves.sum(), rtol=1e-5)
    np.testing.assert_array_equal(tree[1:1024], np.asarray(tree[2::2] + tree[3::2]))


def test_a_draw_beyond_the_sum_ends_on_the_last_item():
    tree = replay.set_leaves(jnp.zeros(16), jnp.arange(5), jnp.float32([1, 2, 0, 4, 1]))
    found = replay.find_leaves(tree, jnp.float32([0, 0.99, 1, 2.99, 3, 6.99, 7, 8, 9]))
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 3, 3, 4, 4, 4])
