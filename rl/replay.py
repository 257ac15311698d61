"""Replay of single transitions, uniform or prioritized (Schaul et al. 2015, arXiv:1511.05952).

Storage and uniform sampling are flashbax's item buffer. An item holds its own `next_observation`, the final
observation where an episode ends; flashbax's trajectory and flat buffers would take the next item's, which is
of another episode after an automatic reset.

The sum tree is ours. flashbax adds differences along the path to the root, so that sums drift from their
leaves (by 8e-4 of the total after 50,000 batches of 64 whose priorities span orders of magnitude), and then
draws leaves whose priority is 0, whose importance weight is infinite. Here a parent is always the sum of its
children, and a draw never enters a subtree whose sum is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flashbax
import jax
import jax.numpy as jnp
from flashbax.buffers.trajectory_buffer import TrajectoryBufferState
from jaxtyping import Array, Float, Int, PRNGKeyArray

PRIORITY_OFFSET = 1e-6  # so that an item whose error is 0 is seen again


class Transition(NamedTuple):
    """What one step of an environment leaves behind. `terminated` ends what is bootstrapped."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_observation: jax.Array


class Replay(NamedTuple):
    """The newest `capacity` items in a ring, and with prioritized replay the sums of their priorities."""

    ring: TrajectoryBufferState
    tree: Float[Array, " nodes"] | None  # heap order: the root at 1, leaf i at nodes / 2 + i
    highest: Float[Array, ""] | None  # the highest priority ever given, which new items get


class Sample(NamedTuple):
    """A batch of items, where they lie (with priorities), and their importance weights, at most 1."""

    items: Transition
    indices: Int[Array, " B"] | None
    weights: Float[Array, " B"]


def init(example: Transition, capacity: int, prioritized: bool = False) -> Replay:
    """An empty replay for items like `example` (without a batch axis)."""
    ring = _buffer(capacity).init(example)
    if not prioritized:
        return Replay(ring, None, None)
    leaves = 2 ** max(1, math.ceil(math.log2(capacity)))
    return Replay(ring, jnp.zeros(2 * leaves), jnp.float32(1))


def add(replay: Replay, items: Transition) -> Replay:
    """Append a batch of items (leading axis), in place of the oldest where the ring is full."""
    count, capacity = len(items.reward), _capacity(replay)
    ring = _buffer(capacity).add(replay.ring, items)
    if replay.tree is None or replay.highest is None:
        return Replay(ring, None, None)
    indices = (replay.ring.current_index + jnp.arange(count)) % capacity
    return Replay(ring, set_leaves(replay.tree, indices, jnp.full(count, replay.highest)), replay.highest)


def size(replay: Replay) -> Int[Array, ""]:
    """Number of items held."""
    return jnp.where(replay.ring.is_full, _capacity(replay), replay.ring.current_index)


def sample(
    replay: Replay, key: PRNGKeyArray, batch_size: int, beta: Float[Array, ""] | float = 1.0
) -> Sample:
    """Draw items with replacement: uniformly, or in proportion to their priorities, one from each stratum.

    The weights are (size P)^-beta over their maximum in the batch (Schaul et al., section 3.4).
    """
    if replay.tree is None:
        drawn = _buffer(_capacity(replay), batch_size).sample(replay.ring, key).experience
        return Sample(drawn, None, jnp.ones(batch_size))
    strata = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    indices = find_leaves(replay.tree, strata * replay.tree[1])
    probability = replay.tree[len(replay.tree) // 2 + indices] / replay.tree[1]
    weights = (size(replay) * probability) ** -beta
    items = jax.tree.map(lambda values: values[0, indices], replay.ring.experience)
    return Sample(items, indices, weights / weights.max())


def prioritize(
    replay: Replay,
    indices: Int[Array, " B"],
    errors: Float[Array, " B"],
    alpha: Float[Array, ""] | float | int,
) -> Replay:
    """Give the items at `indices` the priorities (|error| + offset)^alpha of their temporal differences."""
    assert replay.tree is not None and replay.highest is not None
    priorities = (jnp.abs(errors) + PRIORITY_OFFSET) ** alpha
    tree = set_leaves(replay.tree, indices, priorities)
    return replay._replace(tree=tree, highest=jnp.maximum(replay.highest, priorities.max()))


def set_leaves(
    tree: Float[Array, " nodes"], indices: Int[Array, " B"], values: Float[Array, " B"]
) -> Float[Array, " nodes"]:
    """Set leaves (values of a repeated index must be equal), and every sum above them."""
    nodes = len(tree) // 2 + indices

    def add_up(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tree, nodes = carry
        nodes = nodes // 2
        return tree.at[nodes].set(tree[2 * nodes] + tree[2 * nodes + 1]), nodes

    return jax.lax.fori_loop(0, _depth(tree), add_up, (tree.at[nodes].set(values), nodes))[0]


def find_leaves(tree: Float[Array, " nodes"], sums: Float[Array, " B"]) -> Int[Array, " B"]:
    """The leaves at which the running sum from the left first exceeds `sums`; never one that is 0."""

    def descend(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, nodes = carry
        left = tree[2 * nodes]
        right = (sums >= left) & (tree[2 * nodes + 1] > 0)
        return jnp.where(right, sums - left, sums), 2 * nodes + right

    root = jnp.ones(sums.shape, jnp.int32)
    return jax.lax.fori_loop(0, _depth(tree), descend, (sums, root))[1] - len(tree) // 2


def _depth(tree: Float[Array, " nodes"]) -> int:
    """How many levels of sums stand above the leaves."""
    return int(math.log2(len(tree))) - 1


def _capacity(replay: Replay) -> int:
    return replay.ring.experience.reward.shape[1]


def _buffer(capacity: int, batch_size: int = 1):
    """flashbax's functions on a ring; any number of items of any batch size share one."""
    return flashbax.make_item_buffer(capacity, 1, batch_size, add_batches=True)
