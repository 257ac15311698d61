"""What all algorithms do alike: step environments side by side, divide over devices, schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from core.errors import UserError
from core.mesh import num_shards, shard
from rl.config import Experiment
from rl.envs.wrapper import Discrete, Env, EnvState
from rl.replay import Transition

T = TypeVar("T")


class Stream(NamedTuple):
    """B environments, each leaf with a leading axis, and what they last showed."""

    env: EnvState
    observation: jax.Array


def start(env: Env, key: PRNGKeyArray, environments: int) -> Stream:
    """Environments at the beginning of an episode."""
    observation, state = jax.vmap(env.reset)(jax.random.split(key, environments))
    return divide(Stream(state, observation))


def advance(
    env: Env, stream: Stream, key: PRNGKeyArray, actions: jax.Array
) -> tuple[Stream, Transition, Bool[Array, " B"], dict[str, jax.Array]]:
    """One step of each: the stream after it, the transitions, which were truncated, what the wrapper told.

    The transition's next observation is the one that the action led to, never one after a reset; and it has
    only `terminated`, since an episode that the time limit cuts off would have gone on.
    """
    keys, stream = jax.random.split(key, len(stream.observation)), divide(stream)
    observation, state, reward, terminated, truncated, info = jax.vmap(env.step)(keys, stream.env, actions)
    seen = Transition(stream.observation, actions, reward, terminated, info["final_observation"])
    return divide(Stream(state, observation)), seen, truncated, info


def divide(tree: T, axis: int = 0) -> T:
    """Leaves over the mesh's `data` along `axis`, where that divides; without a mesh, as they are."""

    def constrain(x: jax.Array) -> jax.Array:
        if x.shape[axis] % num_shards("act_batch"):
            return x
        return shard(x, *[None] * axis, "act_batch", *[None] * (x.ndim - axis - 1))

    return jax.tree.map(constrain, tree)


def example(env: Env) -> Transition:
    """One transition, of zeros, for its shapes and types."""
    observation = jnp.zeros(env.observation_shape)
    action = jnp.int32(0) if isinstance(env.actions, Discrete) else jnp.zeros(env.actions.size)
    return Transition(observation, action, jnp.float32(0), jnp.bool_(False), observation)


def flat(tree: T) -> T:
    """[T, B, ...] as [T * B, ...], in the order of time."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def linear(steps: jax.Array, first: float | int, last: float | int, over: float | int) -> Float[Array, ""]:
    """From `first` to `last` in `over` environment steps, and `last` after that."""
    return first + (last - first) * jnp.minimum(1.0, steps / over)


def epsilon(config: Experiment, steps: jax.Array) -> Float[Array, ""]:
    """How often to explore after so many environment steps."""
    options = config.dqn or config.q_learning
    assert options is not None
    return linear(steps, 1.0, options.epsilon_final, options.epsilon_fraction * config.train.steps)


def refuse_normalized_rewards(config: Experiment) -> None:
    """For values learned from one step to the next, which would mix rewards of different scales.

    Raises:
        UserError: if the experiment normalizes rewards.
    """
    if config.env.normalize_reward:
        raise UserError(
            f"env.normalize_reward is not for {config.algorithm}, whose values would mix rewards that were "
            "scaled at different times: remove it"
        )


def once(
    ready: Bool[Array, ""], learn: Callable[[T], tuple[T, dict[str, jax.Array]]], learned: T
) -> tuple[T, dict[str, jax.Array]]:
    """`learn(learned)` once `ready`; until then `learned` as it is, and no figures (NaN).

    All seeds of a run are ready at the same time.
    """
    figures = jax.eval_shape(learn, learned)[1]
    none = jax.tree.map(lambda figure: jnp.full(figure.shape, jnp.nan, figure.dtype), figures)
    return jax.lax.cond(_of_first(ready), learn, lambda learned: (learned, none), learned)


@jax.custom_batching.custom_vmap
def _of_first(flag: jax.Array) -> jax.Array:
    """A flag that runs side by side have in common, as one: of several flags, `cond` would do both sides."""
    return flag


@_of_first.def_vmap
def _(size: int, batched: list[bool], flag: jax.Array) -> tuple[jax.Array, bool]:
    return (flag[0] if batched[0] else flag), False
