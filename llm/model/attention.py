"""The one entry to attention. A mask that a backend can't honour is an error, never an approximation."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm.model.blockwise import blockwise_attention
from llm.model.layers import contract

Backend = Literal["reference", "blockwise"]


def choose_backend(asked: Literal["auto", "reference", "blockwise"], platform: str) -> Backend:
    """The backend for training on `platform`: blockwise on the CPU, elsewhere the reference."""
    if asked != "auto":
        return asked
    return "blockwise" if platform == "cpu" else "reference"


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    window: int | None = None,
    q_offset: int | jax.Array = 0,
    backend: Backend = "reference",
) -> Float[Array, "B S H K"]:
    """Causal softmax attention with grouped keys and values: softmax(q k^T / sqrt(K)) v.

    Query i stands at index `q_offset + i` of the T keys and sees key j if j is not later, of the same
    segment, and fewer than `window` indices back. G divides H. A query that sees no key gives NaN.

    Raises:
        ValueError: if `backend` can't honour the mask asked for.
    """
    if backend == "blockwise":
        if not isinstance(q_offset, int) or q_offset or q.shape[1] != k.shape[1]:
            raise ValueError(
                "blockwise attention needs queries and keys at the same indices: use 'reference'"
            )
        return blockwise_attention(q, k, v, q_segments, kv_segments, window)
    return weighted_values(attention_weights(q, k, q_segments, kv_segments, window, q_offset), v)


def attention_weights(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    window: int | None = None,
    q_offset: int | jax.Array = 0,
) -> Float[Array, "B G H/G S T"]:
    """The attention map in float32; its rows sum to one."""
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = contract("bsgrk,btgk->bgrst", q, k, jnp.float32) * head_dim**-0.5
    i = q_offset + jnp.arange(length)[:, None]
    j = jnp.arange(k.shape[1])[None, :]
    visible = (j <= i) if window is None else (j <= i) & (i - j < window)
    mask = visible & (q_segments[:, :, None] == kv_segments[:, None, :])
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)


def weighted_values(
    weights: Float[Array, "B G R S T"], v: Float[Array, "B T G K"]
) -> Float[Array, "B S H K"]:
    """Sum of values under an attention map, H = G * R."""
    # The product in its own order, then transposed: asked for the other, XLA transposes all of v instead.
    out = contract("bgrst,btgk->bgrsk", weights.astype(v.dtype), v).transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
