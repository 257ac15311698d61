"""One wrapper over all environments: gymnax's interface, less its parameters, with what learners need."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment

from core.errors import UserError
from rl.envs.grid import GRIDS
from rl.envs.mountain_car import MountainCarContinuous
from rl.envs.tokens import Sentences

OURS: dict[str, Callable[[], Environment]] = {
    "Sentences": Sentences,
    "MountainCarContinuous-v0": MountainCarContinuous,  # gymnax's, mended
    **GRIDS,
}


class Discrete(NamedTuple):
    """Actions 0, 1, ... `n` - 1."""

    n: int


class Continuous(NamedTuple):
    """Actions of `size` numbers in [-1, 1], which the wrapper scales to the environment's own."""

    size: int


class EnvState(NamedTuple):
    """An environment's own state, and the episode so far."""

    inner: Any
    episode_return: jax.Array
    episode_length: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Env:
    """One environment, to be vmapped.

    An episode that ends begins anew in the same `step`: the observation returned is the new episode's first,
    and `info["final_observation"]` the one that the ended episode came to (in every step: the one that the
    action led to). `terminated` is an end that the task has; `truncated` one that the time limit makes, after
    which the task would have gone on.
    """

    name: str
    inner: Environment
    params: Any

    @functools.cached_property
    def observation_shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.reset, jax.random.key(0))[0].shape

    @functools.cached_property
    def actions(self) -> Discrete | Continuous:
        space = self.inner.action_space(self.params)
        if isinstance(space, spaces.Discrete):
            return Discrete(int(space.n))
        return Continuous(math.prod(space.shape))

    @property
    def states(self) -> int | None:
        """How many states there are, where observations are their numbers."""
        space = self.inner.observation_space(self.params)
        return int(space.n) if isinstance(space, spaces.Discrete) else None

    @property
    def max_steps(self) -> int:
        """The time limit of an episode."""
        return int(self.params.max_steps_in_episode)

    def reset(self, key: jax.Array) -> tuple[jax.Array, EnvState]:
        """The first observation, float32, and the state."""
        observation, inner = self.inner.reset(key, self.params)
        return _as_float(observation), EnvState(inner, jnp.float32(0), jnp.int32(0))

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
        """Observation, state, reward, terminated, truncated, info.

        Args:
            action: an int scalar, or [size] numbers; those outside of [-1, 1] count as the nearer end.

        `info` has `final_observation`, and `episode_return` and `episode_length` up to and with this step.
        """
        observation, inner, reward, terminated, truncated, info = self.inner.step(
            key, state.inner, self._own(action), self.params
        )
        reward = jnp.float32(reward)
        total, length = state.episode_return + reward, state.episode_length + 1
        goes_on = ~(terminated | truncated)
        told = {
            "final_observation": _as_float(info["final_observation"]),
            "episode_return": total,
            "episode_length": length,
        }
        state = EnvState(inner, jnp.where(goes_on, total, 0.0), jnp.where(goes_on, length, 0))
        return _as_float(observation), state, reward, terminated, truncated, told

    def unreset_step(self, key: jax.Array, state: EnvState, action: jax.Array) -> EnvState:
        """The state that `step` with the same arguments comes to before a new episode begins."""
        _, inner, reward, *_ = self.inner.step_env(
            jax.random.split(key)[0], state.inner, self._own(action), self.params
        )
        return EnvState(inner, state.episode_return + reward, state.episode_length + 1)

    def _own(self, action: jax.Array) -> jax.Array:
        """The action as the environment itself has it."""
        if isinstance(self.actions, Discrete):
            return action
        space = self.inner.action_space(self.params)
        low, high = jnp.float32(space.low), jnp.float32(space.high)
        share = (jnp.clip(action, -1.0, 1.0) + 1.0) / 2.0
        return low + share.reshape(space.shape) * (high - low)


def names() -> list[str]:
    """The environments that `make` knows."""
    return sorted({*OURS, *gymnax.registered_envs})


def make(name: str) -> Env:
    """The environment of that name.

    Raises:
        UserError: for a name that is not known, an environment whose actions aren't one choice or one vector,
            or one whose data can't be fetched.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names())}"
        raise UserError(f"env.name: the environment '{name}' is not known; {hint}")
    try:
        inner = OURS[name]() if name in OURS else gymnax.make(name)[0]
    except OSError as error:  # MNISTBandit-bsuite downloads its images
        raise UserError(f"env.name: {name} can't be made: {error}") from error
    space = inner.action_space(inner.default_params)
    if not isinstance(space, (spaces.Discrete, spaces.Box)):
        raise UserError(f"env.name: the actions of {name} are neither one choice nor one vector: {space}")
    return Env(name, inner, inner.default_params)


def _as_float(observation: Any) -> jax.Array:
    return jnp.asarray(observation, np.float32)
