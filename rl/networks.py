"""The layers that all agents are made of, and the policy and value that PPO learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from core.module import param
from rl.distributions import Categorical, Distribution, Gaussian
from rl.envs.wrapper import Continuous, Discrete

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}
Initializer = Callable[..., jax.Array]  # key, shape, dtype -> values


def orthogonal(scale: float | int) -> Initializer:
    """Kernels with orthonormal rows or columns, times `scale` (Saxe et al. 2014).

    One after another where `vmap` asks for many, as for the seeds of a run: on a CPU each of several batched
    QR decompositions at once can hold a thread of XLA's pool while it waits for another thread (jax 0.10.2).
    """
    initialize = jax.nn.initializers.orthogonal(scale)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.custom_batching.sequential_vmap(lambda key: initialize(key, shape, dtype))(key)

    return init


class Dense(nnx.Module):
    """A linear layer with a bias, which starts at zero."""

    def __init__(self, inputs: int, outputs: int, init: Initializer, rngs: nnx.Rngs):
        self.kernel = param(rngs, init, (inputs, outputs), ("embed", "mlp"), decay=True)
        self.bias = param(rngs, jax.nn.initializers.zeros, (outputs,), ("mlp",), decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.bias[...]


class MLP(nnx.Module):
    """Inputs [B, *shape], flat, through dense layers of the sizes `hidden`: [B, hidden[-1]].

    Images of MinAtar go the same way: with a convolution first, of its authors' 16 channels, Breakout was
    learned more slowly and less well.
    """

    def __init__(
        self, shape: Sequence[int], hidden: Sequence[int], activation: str, init: Initializer, rngs: nnx.Rngs
    ):
        sizes = zip([math.prod(shape), *hidden], hidden, strict=False)
        self.layers = nnx.List([Dense(i, o, init, rngs) for i, o in sizes])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class ActorCritic(nnx.Module):
    """Policy and value, which share nothing, of orthogonal kernels.

    The last layers' scales are those of Andrychowicz et al. 2021: the first policy is nearly uniform.
    """

    def __init__(
        self,
        shape: Sequence[int],
        actions: Discrete | Continuous,
        hidden: Sequence[int],
        activation: str,
        rngs: nnx.Rngs,
    ):
        self.actor = MLP(shape, hidden, activation, orthogonal(math.sqrt(2)), rngs)
        self.critic = MLP(shape, hidden, activation, orthogonal(math.sqrt(2)), rngs)
        outputs = actions.n if isinstance(actions, Discrete) else actions.size
        self.policy = Dense(hidden[-1], outputs, orthogonal(0.01), rngs)
        self.value = Dense(hidden[-1], 1, orthogonal(1.0), rngs)
        scale = lambda: param(rngs, jax.nn.initializers.zeros, (outputs,), ("mlp",), decay=False)  # noqa: E731
        self.log_std = scale() if isinstance(actions, Continuous) else None

    def __call__(self, x: jax.Array) -> tuple[Distribution, jax.Array]:
        """Observations [B, *shape] -> the distribution over actions, values [B]."""
        out, value = self.policy(self.actor(x)), self.value(self.critic(x))[:, 0]
        if self.log_std is None:
            return Categorical(out), value
        mean = jnp.tanh(out)
        return Gaussian(mean, jnp.broadcast_to(self.log_std[...], mean.shape)), value
