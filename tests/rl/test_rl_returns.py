"""Generalized advantage estimates, by hand and by a plain loop."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rl import returns as _returns

GAMMA, LAMBDA = 0.9, 0.8


def gae(*arguments, **named):
    """`rl.returns.gae` on NumPy's arrays."""
    return _returns.gae(*_to_jax(arguments), **_to_jax(named))


def _to_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def column(*values, dtype=np.float32):
    return np.array(values, dtype)[:, None]


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (False, False, 1.175 + 0.72 * 3.1),  # 1 + 0.9 * 0.75 - 0.5, and the trace of what follows
        (False, True, 1.175),  # what was cut off counts by its value, and no further
        (True, False, 0.5),  # 1 - 0.5
        (True, True, 0.5),
    ],
)
def test_gae_by_hand(terminated, truncated, expected):
    advantages, returns = gae(
        rewards=column(1, 2),
        values=column(0.5, 0.25),
        next_values=column(0.75, 1.5),
        terminated=column(terminated, False, dtype=bool),
        truncated=column(truncated, False, dtype=bool),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
    )
    assert_allclose(advantages, column(expected, 3.1), rtol=1e-6)  # 2 + 0.9 * 1.5 - 0.25
    assert_allclose(returns, column(expected + 0.5, 3.35), rtol=1e-6)


def by_loop(rewards, values, next_values, terminated, truncated, mask):
    """The same, a step and an environment at a time."""
    steps, environments = rewards.shape
    advantages = np.zeros((steps, environments))
    for b in range(environments):
        later = 0.0
        for t in reversed(range(steps)):
            if not mask[t, b]:
                later = 0.0 if terminated[t, b] or truncated[t, b] else later
                continue
            delta = rewards[t, b] - values[t, b]
            if not terminated[t, b]:
                delta += GAMMA * next_values[t, b]
            if terminated[t, b] or truncated[t, b]:
                later = 0.0
            later = delta + GAMMA * LAMBDA * later
            advantages[t, b] = later
    return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_gae_as_by_loop(masked):
    rng = np.random.default_rng(0)
    shape = (40, 8)
    rewards, values, next_values = rng.normal(size=(3, *shape)).astype(np.float32)
    terminated, truncated = rng.random((2, *shape)) < 0.15
    mask = rng.random(shape) < 0.7 if masked else np.ones(shape, bool)
    found = gae(rewards, values, next_values, terminated, truncated, GAMMA, LAMBDA, mask if masked else None)
    for ours, theirs in zip(
        found, by_loop(rewards, values, next_values, terminated, truncated, mask), strict=True
    ):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gae_forgets_nothing_but_across_ends():
    """With gamma = lambda = 1 the return of a step is the sum of the rewards up to its episode's end."""
    rewards = np.arange(1.0, 7.0, dtype=np.float32)[:, None]
    zeros = np.zeros_like(rewards)
    ends = column(0, 0, 1, 0, 0, 1, dtype=bool)
    for terminated, truncated in itertools.permutations([ends, np.zeros_like(ends)]):
        _, returns = gae(rewards, zeros, zeros, terminated, truncated, 1.0, 1.0)
        assert_allclose(returns, column(6, 5, 3, 15, 11, 6))


def test_what_pads_a_sequence_changes_nothing():
    """Rows of tokens of two lengths, the shorter one padded with what isn't even a number."""
    rng = np.random.default_rng(1)
    rewards, values, next_values = rng.normal(size=(3, 6, 1)).astype(np.float32)
    ended = column(0, 0, 0, 1, 0, 0, dtype=bool)
    mask = column(1, 1, 1, 1, 0, 0, dtype=bool)
    for array in (rewards, values, next_values):
        array[4:] = np.nan
    never = np.zeros_like(ended)
    padded = gae(rewards, values, next_values, ended, never, GAMMA, LAMBDA, mask)
    whole = gae(rewards[:4], values[:4], next_values[:4], ended[:4], never[:4], GAMMA, LAMBDA)
    for long, short in zip(padded, whole, strict=True):
        assert_allclose(long, np.concatenate([short, np.zeros((2, 1))]), rtol=1e-6)


def test_tokens_of_two_turns():
    """Rows [B, T] as alignment has them: prompt, answer, the user's second turn, answer, padding. Only what
    the model wrote counts, the reward stands on its last token, and the value before a gap is that after it.
    """
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]], bool)
    values = np.where(mask, np.random.default_rng(2).normal(size=mask.shape), np.nan).astype(np.float32)
    rewards, next_values = np.full((2, *mask.shape), np.nan, np.float32)
    terminated, never = np.zeros((2, *mask.shape), bool)
    expected = np.zeros(mask.shape, np.float32)
    for row in range(2):
        (at,) = mask[row].nonzero()
        rewards[row, at], terminated[row, at[-1]] = [0.0] * (len(at) - 1) + [1.0], True
        next_values[row, at] = [*values[row, at[1:]], np.nan]
        later = 0.0
        for i in reversed(range(len(at))):
            following = 0.0 if i == len(at) - 1 else values[row, at[i + 1]]
            later = rewards[row, at[i]] + GAMMA * following - values[row, at[i]] + GAMMA * LAMBDA * later
            expected[row, at[i]] = later
    found = gae(rewards, values, next_values, terminated, never, GAMMA, LAMBDA, mask, time_axis=1)
    assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    assert_allclose(found[1], np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-6)


def test_an_end_on_a_step_that_is_not_there_cuts_the_trace():
    ended, mask = column(0, 1, 0, dtype=bool), column(1, 0, 1, dtype=bool)
    zeros = np.zeros((3, 1), np.float32)
    advantages, _ = gae(column(1, 5, 2), zeros, zeros, ended, np.zeros_like(ended), 1.0, 1.0, mask)
    assert_allclose(advantages, column(1, 0, 2))
