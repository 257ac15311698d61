"""What follows from rewards: advantages and returns. Environments and models are unknown here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    rewards: Float[Array, "T B"],
    values: Float[Array, "T B"],
    next_values: Float[Array, "T B"],
    terminated: Bool[Array, "T B"],
    truncated: Bool[Array, "T B"],
    gamma: float | int,
    gae_lambda: float | int,
    mask: Bool[Array, "T B"] | None = None,
) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438) and returns, time first.

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t = delta_t + gamma lambda (1 - (terminated_t or truncated_t)) A_{t+1}

    A time limit isn't an end of the task, so that the value of where it left off counts; but what comes after
    it is another episode, so that the trace is cut. Returns are A + V, the targets of the value function.

    Args:
        values: V(s_t), of what was seen before the step.
        next_values: V(s'_t), of what the step led to: at an episode's end its own last observation, not the
            next episode's first. Where `terminated` it counts for nothing.
        mask: which steps there are. The others, such as padding or tokens that weren't chosen, give zero for
            both, and the trace passes over them as if they weren't there.
    """
    mask = jnp.ones_like(terminated) if mask is None else mask
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values
    decays = gamma * gae_lambda * ~(terminated | truncated)

    def step(later: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        delta, decay, there = now
        advantage = delta + decay * later
        return jnp.where(there, advantage, later), jnp.where(there, advantage, 0.0)

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, decays, mask), reverse=True)
    return advantages, jnp.where(mask, advantages + values, 0.0)
