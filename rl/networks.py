"""Small networks: what they see is flat, or an image of a few channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from core.module import param
from rl.distributions import Categorical, Distribution, Gaussian
from rl.envs.wrapper import Continuous, Discrete

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}
_CHANNELS = 16  # of the convolution that MinAtar's authors use


class Dense(nnx.Module):
    """A linear layer with an orthogonal kernel, scaled, and a bias."""

    def __init__(self, inputs: int, outputs: int, scale: float | int, rngs: nnx.Rngs):
        init = jax.nn.initializers.orthogonal(scale)
        self.kernel = param(rngs, init, (inputs, outputs), ("embed", "mlp"), decay=True)
        self.bias = param(rngs, jax.nn.initializers.zeros, (outputs,), ("mlp",), decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.bias[...]


class MLP(nnx.Module):
    """Dense layers of the sizes `hidden`, each with the activation."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: str, rngs: nnx.Rngs):
        sizes = zip([inputs, *hidden], hidden, strict=False)
        self.layers = nnx.List([Dense(i, o, math.sqrt(2), rngs) for i, o in sizes])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class Convolution(nnx.Module):
    """A 3 x 3 convolution without padding, then ReLU, flat: [..., H, W, C] -> [..., features].

    Written as a matrix product over patches, which on a CPU is the faster form for images this small.
    """

    def __init__(self, shape: Sequence[int], rngs: nnx.Rngs):
        height, width, channels = shape
        self.dense = Dense(9 * channels, _CHANNELS, math.sqrt(2), rngs)
        self.features = (height - 2) * (width - 2) * _CHANNELS

    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[-3] - 2, x.shape[-2] - 2
        patches = [x[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]
        features = jax.nn.relu(self.dense(jnp.concatenate(patches, -1)))
        return features.reshape(*x.shape[:-3], self.features)


class Torso(nnx.Module):
    """Observations [B, *shape] -> features [B, hidden[-1]]: images go through a convolution first."""

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str, rngs: nnx.Rngs):
        self.convolution = Convolution(shape, rngs) if len(shape) == 3 else None
        inputs = self.convolution.features if self.convolution else math.prod(shape)
        self.mlp = MLP(inputs, hidden, activation, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.convolution(x) if self.convolution else x.reshape(len(x), -1)
        return self.mlp(x)


class ActorCritic(nnx.Module):
    """Policy and value, each with a torso of its own; from images, with one torso for both.

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
        self.actor = Torso(shape, hidden, activation, rngs)
        self.critic = None if len(shape) == 3 else Torso(shape, hidden, activation, rngs)
        outputs = actions.n if isinstance(actions, Discrete) else actions.size
        self.policy = Dense(hidden[-1], outputs, 0.01, rngs)
        self.value = Dense(hidden[-1], 1, 1.0, rngs)
        scale = lambda: param(rngs, jax.nn.initializers.zeros, (outputs,), ("mlp",), decay=False)  # noqa: E731
        self.log_std = scale() if isinstance(actions, Continuous) else None

    def __call__(self, x: jax.Array) -> tuple[Distribution, jax.Array]:
        """Observations [B, *shape] -> the distribution over actions, values [B]."""
        features = self.actor(x)
        out = self.policy(features)
        value = self.value(self.critic(x) if self.critic else features)[..., 0]
        if self.log_std is None:
            return Categorical(out), value
        mean = jnp.tanh(out)
        return Gaussian(mean, jnp.broadcast_to(self.log_std[...], mean.shape)), value
