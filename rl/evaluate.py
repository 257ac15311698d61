"""How good an agent is: whole episodes in fresh environments, with statistics that stand still."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rl.algorithm import Algorithm
from rl.envs.wrapper import Env


def evaluate(
    algorithm: Algorithm, env: Env, agent: Any, key: jax.Array, episodes: int, greedy: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns and lengths, each [episodes], of one episode in each of so many environments.

    Returns are sums of the environment's own rewards, whatever the agent was trained on.
    """
    key, key_reset = jax.random.split(key)
    observation, states = jax.vmap(env.reset)(jax.random.split(key_reset, episodes))
    figures = jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32)

    def goes_on(carry) -> jax.Array:
        return ~carry[-1].all()

    def step(carry):
        key, observation, states, figures, over = carry
        key, key_act, key_step = jax.random.split(key, 3)
        action = algorithm.act(agent, observation, key_act, greedy)
        observation, states, _, terminated, truncated, info = jax.vmap(env.step)(
            jax.random.split(key_step, episodes), states, action
        )
        now = info["episode_return"], info["episode_length"]
        figures = jax.tree.map(lambda old, new: jnp.where(over, old, new), figures, now)
        return key, observation, states, figures, over | terminated | truncated

    over = jnp.zeros(episodes, bool)
    *_, figures, _ = jax.lax.while_loop(goes_on, step, (key, observation, states, figures, over))
    return figures
