"""Rows of tokens into the order of their experts, and back. Both ways, forward and backward, are gathers: a
scatter-add would take turns at every row, and on a GPU in any order.

Letters as in moe.py. A token's choices stand side by side: choice t k + j is token t's j-th.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def queue(experts: Int[Array, "T k"], num_experts: int) -> tuple[Int[Array, " T*k"], Int[Array, " E"]]:
    """The choices in the order of their experts, and how many each expert has.

    Within an expert all first choices come before the second ones, and those by token, so that a full expert
    turns away who wants it least (Lepikhin et al. 2020, arXiv:2006.16668).
    """
    tokens, k = experts.shape
    by_rank = experts.T.reshape(-1)
    order = jnp.argsort(by_rank, stable=True)
    return order % tokens * k + order // tokens, jnp.bincount(by_rank, length=num_experts)


class Slots(NamedTuple):
    """Which slot each choice has, and which choice each slot: one beyond the last where there is none."""

    slot: Int[Array, "T k"]
    choice: Int[Array, " N"]

    @classmethod
    def of(cls, experts: Int[Array, "T k"], order: Array, counts: Array, capacity: int) -> Slots:
        """The first `capacity` of each expert's queue have its slots, one after the other."""
        starts = jnp.cumsum(counts) - counts
        place = inverse(order).reshape(experts.shape) - starts[experts]
        slot = jnp.where(place < capacity, experts * capacity + place, len(counts) * capacity)
        places = jnp.arange(capacity)
        choice = order.at[starts[:, None] + places].get(mode="clip")
        return cls(slot, jnp.where(places < counts[:, None], choice, experts.size).reshape(-1))


def inverse(order: Int[Array, " n"]) -> Int[Array, " n"]:
    """The inverse of a permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)


@jax.custom_vjp
def lay_out(x: Float[Array, "T D"], slots: Slots) -> Float[Array, "N D"]:
    """Each slot's token; zeros where it has none."""
    return _take(x, slots.choice // slots.slot.shape[1])


def _lay_out_backward(slots: Slots, g):
    own = _take(g, slots.slot)
    return own.astype(jnp.float32).sum(1).astype(g.dtype), None


lay_out.defvjp(lambda x, slots: (lay_out(x, slots), slots), _lay_out_backward)


@jax.custom_vjp
def collect(rows: Float[Array, "N D"], weights: Float[Array, "T k"], slots: Slots) -> Float[Array, "T D"]:
    """The weighted sum, in float32, of the rows in each token's slots; its other choices add nothing."""
    own = _take(rows, slots.slot).astype(jnp.float32)
    return (own * weights[..., None]).sum(1).astype(rows.dtype)


def _collect_forward(rows, weights, slots):
    return collect(rows, weights, slots), (rows, weights, slots)


def _collect_backward(residuals, g):
    rows, weights, slots = residuals
    d_rows = _take(g, slots.choice // weights.shape[1]).astype(jnp.float32)
    d_rows = d_rows * _take(weights.reshape(-1, 1), slots.choice)
    own = _take(rows, slots.slot).astype(jnp.float32)
    d_weights = (own * g.astype(jnp.float32)[:, None]).sum(-1)
    return d_rows.astype(rows.dtype), d_weights, None


collect.defvjp(_collect_forward, _collect_backward)


def _take(x: Array, index: Array) -> Array:
    """Rows by index, zeros where it is beyond the last."""
    return x.at[index].get(mode="fill", fill_value=0)
