"""The key-value cache: what attention has to remember of the tokens that came before."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.model.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, an array for each layer; slots from `length` on are free.

    A row is one head of one sequence: a decoding step reads its slots in one piece. To attention each row is
    a sequence with one key-value head. (Wherever the array written and the array read differ in shape, be it
    by an axis of size 1, XLA's CPU backend copies the whole cache at every step.)
    """

    k: tuple[Float[Array, "B*G T K"], ...]
    v: tuple[Float[Array, "B*G T K"], ...]
    segments: Int[Array, "B T"]  # 0 marks a slot that holds padding
    length: Int[Array, ""]

    @property
    def slots(self) -> int:
        return self.segments.shape[1]


class Ring(NamedTuple):
    """A cache for decoding rows that begin and end at different times, a token of each at every step.

    All rows write into one slot, `column`, which moves on by one each step and from the last slot to the
    first; what a row wrote a step ago is one slot behind it, wherever the row began. So a step writes each
    array in one piece, where slots of their own for each row would be a scatter. A token at position p of
    its row sees the p slots behind it: the others, written by rows that ended, need no clearing. A row must
    not have more tokens than there are slots.
    """

    k: tuple[Float[Array, "B*G T K"], ...]
    v: tuple[Float[Array, "B*G T K"], ...]
    column: Int[Array, ""]  # where the next token is written

    @property
    def slots(self) -> int:
        return self.k[0].shape[1]

    @property
    def order(self) -> Int[Array, " T"]:
        """The index of each slot when the one being written is last, and the oldest first."""
        return (jnp.arange(self.slots) - self.column - 1) % self.slots


def empty_ring(config: ModelConfig, batch: int, slots: int, dtype: str = "float32") -> Ring:
    """A ring of `slots` tokens of each of `batch` sequences."""
    cache = empty_cache(config, batch, slots, dtype)
    return Ring(cache.k, cache.v, jnp.int32(0))


def resize_ring(ring: Ring, groups: int, rows: Int[Array, " B2"], slots: int) -> Ring:
    """The given rows, any number of them and some twice, in a ring with `slots` slots.

    Of each the newest tokens are kept, as many as there are slots.
    """
    source = (ring.column - slots + jnp.arange(slots)) % ring.slots

    def pick(array):
        _, old, size = array.shape
        array = array.reshape(-1, groups, old, size)[rows][:, :, source]
        return array.reshape(-1, slots, size)

    return Ring(tuple(map(pick, ring.k)), tuple(map(pick, ring.v)), jnp.int32(0))


def into_ring(ring: Ring, row: Int[Array, ""], k: tuple[jax.Array, ...], v: tuple[jax.Array, ...]) -> Ring:
    """The ring with the keys and values of one sequence, [G T K] as `in_order` gives them, in a row."""

    def put(array, new):
        return jax.lax.dynamic_update_slice(array, new, (row * new.shape[0], 0, 0))

    return Ring(tuple(map(put, ring.k, k)), tuple(map(put, ring.v, v)), ring.column)


def in_order(cache: Cache, column: Int[Array, ""], slots: int):
    """Keys and values of a cache's one sequence as a ring's row has them, before `column` is written."""
    source = cache.length - 1 - (column - 1 - jnp.arange(slots)) % slots
    pick = lambda array: array[:, jnp.maximum(source, 0)]  # noqa: E731
    return tuple(map(pick, cache.k)), tuple(map(pick, cache.v))


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: str = "float32") -> Cache:
    """A cache for `slots` tokens of each of `batch` sequences."""
    shape = (batch * config.num_kv_heads, slots, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
    return Cache(k, v, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


def write(rows: Float[Array, "N T K"], new: Float[Array, "B S G K"], start: int | jax.Array) -> jax.Array:
    """The rows, N = B * G, with `new` in the slots from `start` on."""
    _, length, _, size = new.shape
    new = new.transpose(0, 2, 1, 3).reshape(rows.shape[0], length, size)
    return jax.lax.dynamic_update_slice(rows, new.astype(rows.dtype), (0, start, 0))


def as_rows(q: Float[Array, "B S H K"], groups: int) -> Float[Array, "N S R K"]:
    """Queries beside the row that they look at, N = B * G and R = H / G."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 1, 3, 4)
    return q.reshape(batch * groups, length, heads // groups, size)


def from_rows(y: Float[Array, "N S R K"], batch: int) -> Float[Array, "B S H K"]:
    """The inverse of `as_rows`."""
    rows, length, ratio, size = y.shape
    y = y.reshape(batch, rows // batch, length, ratio, size).transpose(0, 2, 1, 3, 4)
    return y.reshape(batch, length, -1, size)


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with `slots` slots, at least as many as it has."""
    more = slots - cache.slots
    pad = lambda rows: jnp.pad(rows, ((0, 0), (0, more), (0, 0)))  # noqa: E731
    segments = jnp.pad(cache.segments, ((0, 0), (0, more)))
    return Cache(tuple(map(pad, cache.k)), tuple(map(pad, cache.v)), segments, cache.length)
