"""The simplest environment there is: the action that is worth most is what one sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

from rl.envs.wrapper import Env

N = 3
LENGTH = 5  # steps of an episode, which ends by the time limit


@struct.dataclass
class IdentityState(environment.EnvState):
    shown: jax.Array


@struct.dataclass
class IdentityParams(environment.EnvParams):
    max_steps_in_episode: int = LENGTH


class Identity(environment.Environment):
    """`shows` one of `N`, `one-hot` or as a `number`; or `continuous`, in [-1, 1], met on a scale of two."""

    def __init__(self, shows: str):
        super().__init__()
        self.shows, self.continuous = shows, shows == "continuous"

    @property
    def default_params(self):
        return IdentityParams()

    def action_space(self, params=None):
        return spaces.Box(-2.0, 2.0, (1,)) if self.continuous else spaces.Discrete(N)

    def observation_space(self, params=None):
        if self.shows == "number":
            return spaces.Discrete(N)
        return spaces.Box(-1.0, 1.0, (1 if self.continuous else N,))

    def reset_env(self, key, params):
        state = IdentityState(time=0, shown=self._draw(key))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        if self.continuous:
            reward = -jnp.abs(action[0] / 2 - state.shown)
        else:
            reward = jnp.float32(action == state.shown)
        state = IdentityState(time=state.time + 1, shown=self._draw(key))
        return self.get_obs(state), state, reward, jnp.bool_(False), {}

    def get_obs(self, state, params=None, key=None):
        if self.shows == "number":
            return state.shown
        return state.shown[None] if self.continuous else jax.nn.one_hot(state.shown, N)

    def _draw(self, key):
        if self.continuous:
            return jax.random.uniform(key, minval=-0.9, maxval=0.9)
        return jax.random.randint(key, (), 0, N)


def identity(shows: str) -> Env:
    inner = Identity(shows)
    return Env("Identity", inner, inner.default_params)
