"""Attention block by block, for the CPU: FlashAttention's arithmetic (Dao et al. 2022, arXiv:2205.14135).

No S x S matrix outlives its block: the forward pass keeps each row's log-sum-exp, the backward pass forms
the weights again from it. Blocks that the causal or window mask empties are never computed. The loop over
blocks is unrolled, since XLA's CPU backend runs independent products side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_BLOCKS = 16
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def block_size(length: int) -> int:
    """Rows in a block: 128, or more where that would unroll more than MAX_BLOCKS."""
    return min(length, max(128, -(-length // MAX_BLOCKS)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B S H K"]:
    """Causal attention within segments and, if given, fewer than `window` indices back. G divides H."""
    return _forward(q, k, v, q_segments, kv_segments, window)[0]


def _spans(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Each block of rows with the keys that any of its rows can see."""
    size = block_size(length)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _mask(segments, rows: slice, cols: slice, window: int | None):
    """[B, rows, cols]: which keys each query sees. `segments` are those of the queries and of the keys."""
    i = jnp.arange(rows.start, rows.stop)[:, None]
    j = jnp.arange(cols.start, cols.stop)[None, :]
    visible = (j <= i) if window is None else (j <= i) & (i - j < window)
    return visible & (segments[0][:, rows, None] == segments[1][:, None, cols])


def _split_heads(x, groups: int):
    """[B, S, H, K] -> [B, G, H/G, S, K]: each head's rows together, for batched products."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def _join_heads(x):
    """[B, G, R, S, K] -> [B, S, H, K]."""
    batch, groups, ratio, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * ratio, head_dim)


def _forward(q, k, v, q_segments, kv_segments, window):
    groups, segments = k.shape[2], (q_segments, kv_segments)
    scaled = _split_heads(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), groups)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, sums = [], []
    for rows, cols in _spans(q.shape[1], window):
        scores = _einsum("bgrik,bgjk->bgrij", scaled[:, :, :, rows], keys[:, :, cols])
        mask = _mask(segments, rows, cols, window)[:, None, None]
        scores = jnp.where(mask, scores, -jnp.inf)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _einsum("bgrij,bgjk->bgrik", weights.astype(v.dtype), values[:, :, cols])
        outs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out = _join_heads(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, segments, out, jnp.concatenate(sums, axis=3))


def _backward(window, residuals, g):
    """Maps are formed transposed, keys before queries: all products but that of dq then read them as they
    lie, and that one reads the keys transposed, which are smaller.
    """
    q, k, v, segments, out, log_sums = residuals
    groups, scale, dtype = k.shape[2], q.shape[-1] ** -0.5, q.dtype
    scaled = _split_heads(q * jnp.asarray(scale, dtype), groups)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    # Behind a barrier, else XLA reads the keys as they lie, by a product that it lacks for bfloat16.
    turned = jax.lax.optimization_barrier(keys.swapaxes(2, 3))
    g_heads = _split_heads(g, groups)
    # d score = weight * (d weight - <d out, out>): the row sum of the softmax's derivative.
    inner = _split_heads((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), groups)
    inner, log_sums = (x[:, :, None, :, :, 0] for x in (inner, log_sums))  # [B, G, 1, R, S]
    dq, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for rows, cols in _spans(q.shape[1], window):
        q_rows, g_rows = scaled[:, :, :, rows], g_heads[:, :, :, rows]
        k_cols, v_cols = keys[:, :, cols], values[:, :, cols]
        mask = _mask(segments, rows, cols, window).transpose(0, 2, 1)[:, None, :, None]
        scores = jnp.where(mask, _einsum("bgjk,bgrik->bgjri", k_cols, q_rows), -jnp.inf)
        weights = jnp.exp(scores - log_sums[..., rows])
        d_weights = _einsum("bgjk,bgrik->bgjri", v_cols, g_rows)
        d_scores = (weights * (d_weights - inner[..., rows])).astype(dtype)
        dv = dv.at[:, :, cols].add(_einsum("bgjri,bgrik->bgjk", weights.astype(dtype), g_rows))
        dk = dk.at[:, :, cols].add(_einsum("bgjri,bgrik->bgjk", d_scores, q_rows))
        dq.append(_einsum("bgkj,bgjri->bgkri", turned[..., cols], d_scores) * scale)
    return (
        _join_heads(jnp.concatenate(dq, axis=4).transpose(0, 1, 3, 4, 2)).astype(q.dtype),
        dk.transpose(0, 2, 1, 3).astype(k.dtype),
        dv.transpose(0, 2, 1, 3).astype(v.dtype),
        None,
        None,
    )


blockwise_attention.defvjp(_forward, _backward)
