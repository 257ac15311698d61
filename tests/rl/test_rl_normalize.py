"""Running statistics against NumPy's over all at once, and the scale of rewards against a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rl.envs import normalize


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_moments_of_batches_are_those_of_all(mean):
    rng = np.random.default_rng(0)
    batches = [rng.normal(mean, 1, size=(size, 4, 3)).astype(np.float32) for size in (1, 7, 30, 2)]
    moments = normalize.no_moments((3,))
    for batch in batches:
        moments = normalize.merge(moments, jnp.array(batch))
    everything = np.concatenate(batches).reshape(-1, 3).astype(float)
    assert moments.seen == len(everything)
    assert_allclose(moments.mean, everything.mean(0), rtol=1e-5, atol=1e-6)
    assert_allclose(moments.variance, everything.var(0), rtol=1e-3 if mean else 1e-5)


def test_moments_stay_right_past_the_whole_numbers_of_float32():
    moments = normalize.Moments(jnp.float32(2**26), jnp.float32(1), jnp.float32(4))
    for _ in range(50):
        moments = normalize.merge(moments, jnp.float32([-1.0, 3.0]))  # mean 1, variance 4: as it was
    assert_allclose([moments.mean, moments.variance], [1, 4], rtol=1e-6)


def test_normalized_observations():
    moments = normalize.merge(normalize.no_moments((2,)), jnp.float32([[0, 10], [4, 30]]))
    assert_allclose(
        normalize.normalize(moments, jnp.float32([[4, 20], [2, 1e6]])), [[1, 0], [0, 10]], rtol=1e-5
    )
    raw = jnp.float32([[123.0, -5.0]])
    assert_allclose(normalize.normalize(normalize.no_moments((2,)), raw), raw)


def test_scaled_rewards_as_by_loop():
    """Episodes whose only reward is the last one: cleared before it is counted, it would never be seen."""
    gamma, steps, environments = 0.9, 12, 2
    done = np.zeros((steps, environments), bool)
    done[3::4, 0] = done[5::6, 1] = True
    rewards = np.where(done, 5.0, 0.0).astype(np.float32)
    seen, running = [], np.zeros(environments)
    for t in range(steps):
        running = gamma * running + rewards[t]
        seen.append(running)
        running = np.where(done[t], 0, running)
    scale = normalize.no_reward_scale(environments)
    first, _ = normalize.scale_rewards(scale, *map(jnp.array, (rewards[:5], done[:5])), gamma)
    scale, scaled = normalize.scale_rewards(first, *map(jnp.array, (rewards[5:], done[5:])), gamma)
    deviation = np.std(seen)
    assert deviation > 0
    assert_allclose(scale.moments.deviation, deviation, rtol=1e-5)
    assert_allclose(scaled, rewards[5:] / deviation, rtol=1e-5)
    assert_allclose(scale.running, running)


def test_what_never_varies_has_no_variance_below_zero():
    """Compiled together with its start, rounding once made it -6e-8, and its root no number."""

    @jax.jit
    def deviation():
        moments = normalize.no_moments()
        for size in (8, 7, 24):
            moments = normalize.merge(moments, jnp.full((size,), 0.1))
        return moments.variance, moments.deviation

    variance, found = deviation()
    assert variance >= 0 and 0 < found < 1e-3


def test_rewards_that_are_all_zero_stay_so():
    @jax.jit
    def scaled():
        scale = normalize.no_reward_scale(2)
        return normalize.scale_rewards(scale, jnp.zeros((4, 2)), jnp.zeros((4, 2), bool), 0.99)[1]

    assert not scaled().any()
