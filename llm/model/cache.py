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
