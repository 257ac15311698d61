"""MountainCarContinuous-v0 as Gymnasium has it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments.classic_control import ContinuousMountainCar
from gymnax.environments.classic_control.continuous_mountain_car import EnvParams, EnvState


class MountainCarContinuous(ContinuousMountainCar):
    """gymnax's, with the wall on the left: a car that runs into it stops there.

    gymnax 1.0.1 lets it keep its speed, down to the most there is, so that it rests against the wall until it
    has braked from that. (Its discrete MountainCar-v0 stops the car as Gymnasium does.)
    """

    def step_env(
        self, key: jax.Array, state: EnvState, action: int | float | jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        _, state, reward, terminated, info = super().step_env(key, state, action, params)
        stopped = (state.position == params.min_position) & (state.velocity < 0)
        state = state.replace(velocity=jnp.where(stopped, 0.0, state.velocity))
        observation, state = self._apply_transition_gradient_policy(self.get_obs(state), state)
        return observation, state, reward, terminated, info
