"""Running mean and variance, and what is normalized with them.

Statistics are merged a batch at a time by Chan, Golub & LeVeque's formula (1979), which has none of the
cancellation of a sum of squares. Learners normalize as they read: environments and replay hold what the
environment gave, so that an observation, the one after it and the final one of an episode are always
normalized with the same statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_EPSILON = 1e-8
_CLIP = 10.0  # standard deviations


class Moments(NamedTuple):
    """Of all that was seen: how much, its mean and its variance."""

    seen: jax.Array
    mean: jax.Array
    variance: jax.Array

    @property
    def deviation(self) -> jax.Array:
        """The standard deviation; 1 where nothing was seen."""
        return jnp.sqrt(self.variance + _EPSILON)


def no_moments(shape: tuple[int, ...] = ()) -> Moments:
    """Before anything was seen."""
    return Moments(jnp.float32(0), jnp.zeros(shape), jnp.ones(shape))


def merge(moments: Moments, batch: jax.Array) -> Moments:
    """With a batch [..., *shape] added.

    Written as weighted means, which stay right when `seen` has grown past float32's whole numbers.
    """
    batch = batch.reshape(-1, *moments.mean.shape)
    mean = batch.mean(0)
    variance = ((batch - mean) ** 2).mean(0)
    seen = moments.seen + len(batch)
    # At most 1, whatever a compiler makes of a division, or what never varies had a variance below 0.
    share = jnp.minimum(len(batch) / seen, 1.0)
    delta = mean - moments.mean
    return Moments(
        seen,
        moments.mean + share * delta,
        (1 - share) * (moments.variance + share * delta**2) + share * variance,
    )


def normalize(moments: Moments, observations: jax.Array) -> jax.Array:
    """Observations [..., *shape] in standard deviations from the mean; as they are where nothing was seen."""
    scaled = (observations - moments.mean) / moments.deviation
    return jnp.where(moments.seen > 0, jnp.clip(scaled, -_CLIP, _CLIP), observations)


class RewardScale(NamedTuple):
    """Moments of the discounted sum of rewards so far, whose deviation rewards are divided by."""

    moments: Moments
    running: jax.Array  # [B] that sum in each environment's episode


def no_reward_scale(environments: int) -> RewardScale:
    return RewardScale(no_moments(), jnp.zeros(environments))


def scale_rewards(
    scale: RewardScale, rewards: jax.Array, done: jax.Array, gamma: float | int
) -> tuple[RewardScale, jax.Array]:
    """The scale with these steps added, and the rewards [T, B] by it.

    Rewards keep their sign and their zero. The reward that ends an episode is counted before the sum is
    cleared: it is often the only one.

    Args:
        done: [T, B] whether the step ended an episode, in whatever way.
    """

    def step(running: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, ended = now
        total = gamma * running + reward
        return jnp.where(ended, 0.0, total), total

    running, totals = jax.lax.scan(step, scale.running, (rewards, done))
    moments = merge(scale.moments, totals)
    return RewardScale(moments, running), jnp.clip(rewards / moments.deviation, -_CLIP, _CLIP)
