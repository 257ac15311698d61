"""Networks of the algorithms that learn action values: Q networks, deterministic actors and their critics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rl.networks import MLP, Dense, orthogonal

# Uniform within 1 / sqrt(inputs), as Lillicrap et al. 2015 have it (and PyTorch). With the larger orthogonal
# kernels of `rl.networks` first values are so steep that a cart pole's were not yet learned at the end.
_SMALL = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Of last layers: first actions are the noise's alone, first values say nothing.
_NEAR_ZERO = orthogonal(0.01)


class QNetwork(nnx.Module):
    """The values of all actions. Dueling (Wang et al. 2016): a state's value and, centred, the advantages."""

    def __init__(
        self, shape: Sequence[int], actions: int, hidden: Sequence[int], dueling: bool, rngs: nnx.Rngs
    ):
        self.body = MLP(shape, hidden, "relu", _SMALL, rngs)
        self.advantage = Dense(hidden[-1], actions, _SMALL, rngs)
        self.value = Dense(hidden[-1], 1, _SMALL, rngs) if dueling else None

    def __call__(self, observation: Float[Array, "B ..."]) -> Float[Array, "B A"]:
        features = self.body(observation)
        advantage = self.advantage(features)
        if self.value is None:
            return advantage
        return self.value(features) + advantage - advantage.mean(-1, keepdims=True)


class Actor(nnx.Module):
    """One action in [-1, 1] for each observation."""

    def __init__(self, shape: Sequence[int], actions: int, hidden: Sequence[int], rngs: nnx.Rngs):
        self.body = MLP(shape, hidden, "relu", _SMALL, rngs)
        self.action = Dense(hidden[-1], actions, _NEAR_ZERO, rngs)

    def __call__(self, observation: Float[Array, "B ..."]) -> Float[Array, "B A"]:
        return jnp.tanh(self.action(self.body(observation)))


class Critic(nnx.Module):
    """The value of one action in [-1, 1]."""

    def __init__(self, shape: Sequence[int], actions: int, hidden: Sequence[int], rngs: nnx.Rngs):
        self.body = MLP((math.prod(shape) + actions,), hidden, "relu", _SMALL, rngs)
        self.value = Dense(hidden[-1], 1, _NEAR_ZERO, rngs)

    def __call__(self, observation: Float[Array, "B ..."], action: Float[Array, "B A"]) -> Float[Array, " B"]:
        flat = observation.reshape(len(observation), -1)
        return self.value(self.body(jnp.concatenate([flat, action], -1)))[:, 0]
