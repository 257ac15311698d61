"""What follows from rewards: advantages and returns. Environments and models are unknown here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    rewards: Float[Array, "*shape"],
    values: Float[Array, "*shape"],
    next_values: Float[Array, "*shape"],
    terminated: Bool[Array, "*shape"],
    truncated: Bool[Array, "*shape"],
    gamma: float | int,
    gae_lambda: float | int,
    mask: Bool[Array, "*shape"] | None = None,
    time_axis: int = 0,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438) and returns.

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t = delta_t + gamma lambda (1 - (terminated_t or truncated_t)) A_{t+1}

    A time limit isn't an end of the task, so that the value of where it left off counts; but what comes after
    it is another episode, so that the trace is cut. Returns are A + V, the targets of the value function.

    Args:
        values: V(s_t), of what was seen before the step.
        next_values: V(s'_t), of what the step led to: at an episode's end its own last observation, not the
            next episode's first; before steps that aren't there the first that is. Where `terminated` it
            counts for nothing.
        mask: which steps there are. The others, such as padding or tokens that weren't chosen, give zero for
            both, and the trace passes over them: their rewards don't count, and if an episode ends there it
            is cut.
        time_axis: 0 for [T, B] steps, 1 for [B, T] tokens.
    """
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    ended = jnp.logical_or(terminated, truncated)
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values

    def step(later: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        delta, ended, there = now
        later = jnp.where(ended, 0.0, later)
        advantage = jnp.where(there, delta + gamma * gae_lambda * later, 0.0)
        return jnp.where(there, advantage, later), advantage

    steps = jax.tree.map(lambda x: jnp.moveaxis(x, time_axis, 0), (deltas, ended, mask))
    _, advantages = jax.lax.scan(step, jnp.zeros_like(steps[0][0]), steps, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, time_axis)
    return advantages, jnp.where(mask, advantages + values, 0.0)
