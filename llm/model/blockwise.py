"""Attention block by block, for the CPU: FlashAttention's arithmetic (Dao et al. 2022, arXiv:2205.14135).

No S x S matrix outlives its block: the forward pass keeps each row's log-sum-exp, the backward pass forms
the weights again from it. Keys that the mask hides from a whole block of queries are never read: of a window
or of local blocks the range is known, and a document's global blocks are fetched from wherever it begins. The
loop over blocks is unrolled, since XLA's CPU backend runs independent products side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.model.masks import Mask

MAX_BLOCKS = 16
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def block_size(length: int) -> int:
    """Rows in a block: 128, or more where that would unroll more than MAX_BLOCKS."""
    return min(length, max(128, -(-length // MAX_BLOCKS)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    starts: Int[Array, "B S"] | None,
    mask: Mask,
) -> Float[Array, "B S H K"]:
    """Attention under `mask` within documents that begin at index `starts`, or in the row. G divides H."""
    return _forward(q, k, v, starts, mask)[0]


class Span(NamedTuple):
    """A block of queries and the keys that any of them can see: `far` ones, then those of `near`."""

    queries: slice
    near: slice
    far: int  # keys before `near`: global ones of the first query's document, which alone can begin there
    far_start: jax.Array | None  # [B] index of the first of them; None: 0

    def places(self) -> jax.Array:
        """The keys' indices, [B or 1, keys]."""
        near = jnp.arange(self.near.start, self.near.stop)[None]
        if not self.far:
            return near
        far = jnp.arange(self.far)[None]
        if self.far_start is not None:
            far = self.far_start[:, None] + far
        return jnp.concatenate([far, jnp.broadcast_to(near, (len(far), near.shape[1]))], axis=1)

    def take(self, x: jax.Array, axis: int) -> jax.Array:
        """What x [B, ...] has at the keys' indices along `axis`."""
        near = jax.lax.slice_in_dim(x, self.near.start, self.near.stop, axis=axis)
        if not self.far:
            return near
        if self.far_start is None:
            far = jax.lax.slice_in_dim(x, 0, self.far, axis=axis)
        else:
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=self.far, axis=axis - 1)
            far = jax.vmap(cut)(x, self.far_start)
        return jnp.concatenate([far, near], axis=axis)

    def add(self, sums: jax.Array, x: jax.Array) -> jax.Array:
        """`sums` [B, G, S, K] with x [B, G, keys, K] added at the keys' indices."""
        sums = sums.at[:, :, self.near].add(x[:, :, self.far :])
        if not self.far:
            return sums
        if self.far_start is None:
            return sums.at[:, :, : self.far].add(x[:, :, : self.far])

        def add(sums, x, start):
            x = x + jax.lax.dynamic_slice_in_dim(sums, start, self.far, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(sums, x, start, axis=1)

        return jax.vmap(add)(sums, x[:, :, : self.far], self.far_start)


def _spans(length: int, starts: jax.Array | None, mask: Mask) -> Iterator[Span]:
    size = block_size(length)
    for first in range(0, length, size):
        stop = min(first + size, length)
        near = mask.first_near(first, aligned=starts is None) if mask.causal else 0
        far = min(mask.global_keys, near)
        # No further than to end where `near` begins, so that no key is read twice.
        far_start = None if starts is None else jnp.minimum(starts[:, first], near - far)
        yield Span(slice(first, stop), slice(near, stop if mask.causal else length), far, far_start)


def _visible(mask: Mask, span: Span, starts: jax.Array | None):
    """[B or 1, queries, keys]: which keys each query sees."""
    i = jnp.arange(span.queries.start, span.queries.stop)[:, None]
    start = None if starts is None else starts[:, span.queries, None]
    return mask.visible(i, span.places()[:, None], start)


def split_heads(x, groups: int):
    """[B, S, H, K] -> [B, G, H/G, S, K]: each head's rows together, for batched products."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def join_heads(x):
    """[B, G, R, S, K] -> [B, S, H, K]."""
    batch, groups, ratio, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * ratio, head_dim)


def _forward(q, k, v, starts, mask):
    groups = k.shape[2]
    scaled = split_heads(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), groups)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, sums = [], []
    for span in _spans(q.shape[1], starts, mask):
        scores = _einsum("bgrik,bgjk->bgrij", scaled[:, :, :, span.queries], span.take(keys, axis=2))
        scores = jnp.where(_visible(mask, span, starts)[:, None, None], scores, -jnp.inf)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _einsum("bgrij,bgjk->bgrik", weights.astype(v.dtype), span.take(values, axis=2))
        outs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out = join_heads(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, starts, out, jnp.concatenate(sums, axis=3))


def _backward(mask, residuals, g):
    """Maps are formed transposed, keys before queries: all products but that of dq then read them as they
    lie, and that one reads the keys transposed, which are smaller.
    """
    q, k, v, starts, out, log_sums = residuals
    groups, scale, dtype = k.shape[2], q.shape[-1] ** -0.5, q.dtype
    scaled = split_heads(q * jnp.asarray(scale, dtype), groups)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    # Behind a barrier, else XLA reads the keys as they lie, by a product that it lacks for bfloat16.
    turned = jax.lax.optimization_barrier(keys.swapaxes(2, 3))
    g_heads = split_heads(g, groups)
    # d score = weight * (d weight - <d out, out>): the row sum of the softmax's derivative.
    inner = split_heads((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), groups)
    inner, log_sums = (x[:, :, None, :, :, 0] for x in (inner, log_sums))  # [B, G, 1, R, S]
    dq, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for span in _spans(q.shape[1], starts, mask):
        rows, visible = span.queries, _visible(mask, span, starts).transpose(0, 2, 1)[:, None, :, None]
        q_rows, g_rows = scaled[:, :, :, rows], g_heads[:, :, :, rows]
        scores = _einsum("bgjk,bgrik->bgjri", span.take(keys, axis=2), q_rows)
        weights = jnp.exp(jnp.where(visible, scores, -jnp.inf) - log_sums[..., rows])
        d_weights = _einsum("bgjk,bgrik->bgjri", span.take(values, axis=2), g_rows)
        d_scores = (weights * (d_weights - inner[..., rows])).astype(dtype)
        dv = span.add(dv, _einsum("bgjri,bgrik->bgjk", weights.astype(dtype), g_rows))
        dk = span.add(dk, _einsum("bgjri,bgrik->bgjk", d_scores, q_rows))
        dq.append(_einsum("bgkj,bgjri->bgkri", span.take(turned, axis=3), d_scores) * scale)
    return (
        join_heads(jnp.concatenate(dq, axis=4).transpose(0, 1, 3, 4, 2)).astype(q.dtype),
        dk.transpose(0, 2, 1, 3).astype(k.dtype),
        dv.transpose(0, 2, 1, 3).astype(v.dtype),
        None,
    )


blockwise_attention.defvjp(_forward, _backward)
