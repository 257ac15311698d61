"""What a policy gives for an observation: a distribution over actions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.losses import categorical_entropy, gaussian_entropy


class Categorical(NamedTuple):
    """One of n actions."""

    logits: jax.Array  # [..., n]

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, self.logits)

    def mode(self) -> jax.Array:
        return self.logits.argmax(-1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(self.logits, action[..., None], -1)[..., 0]
        return chosen - jax.nn.logsumexp(self.logits, -1)

    def entropy(self) -> jax.Array:
        return categorical_entropy(self.logits)


class Gaussian(NamedTuple):
    """A vector of independent normal components.

    An action beyond the environment's bounds is cut there by the environment, and its probability stays that
    of what was sampled.
    """

    mean: jax.Array  # [..., n]
    log_std: jax.Array  # [..., n]

    def sample(self, key: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def mode(self) -> jax.Array:
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        distance = (action - self.mean) * jnp.exp(-self.log_std)
        return -(0.5 * distance**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> jax.Array:
        return gaussian_entropy(self.log_std)


Distribution = Categorical | Gaussian
