"""What every algorithm is: pure functions, made from a configuration and an environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class State(NamedTuple):
    """All that a training run is between two updates; a checkpoint holds it in these two parts."""

    agent: Any  # what acting needs: parameters, and the statistics that observations are normalized with
    training: Any  # all else: optimizer, environments, replay, random key


class Algorithm(NamedTuple):
    """Functions to be jitted, vmapped over seeds (each leaf of the state then has a leading axis), sharded.

    `update` does `steps_per_update` environment steps. Its metrics are scalars by name. Of episodes that
    ended in it they tell `episodes`, `returns` and `lengths`, a count and two sums; the rest are means, or
    NaN where this update has no such figure.
    """

    init: Callable[[jax.Array], State]  # random key -> state
    update: Callable[[State], tuple[State, dict[str, jax.Array]]]
    # agent, observations [B, ...] as the environment gives them, random key, greedy -> actions [B, ...]
    act: Callable[[Any, jax.Array, jax.Array, bool], jax.Array]
    # agent, observations [B, ...] -> what it expects of the states under its own policy, [B]
    value: Callable[[Any, jax.Array], jax.Array]


def episode_metrics(done: jax.Array, info: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`episodes`, `returns` and `lengths` of those that ended.

    Args:
        done: whether an episode ended, of any shape.
        info: what `Env.step` gave, its figures of that shape.
    """
    ended = done.astype("float32")
    return {
        "episodes": ended.sum(),
        "returns": (ended * info["episode_return"]).sum(),
        "lengths": (ended * info["episode_length"]).sum(),
    }
