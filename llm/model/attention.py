"""The one entry to attention. A mask that a backend can't honour is an error, never an approximation.

| backend     | runs on  | documents | window | sparsity | not causal | dtypes            | memory |
| ----------- | -------- | --------- | ------ | -------- | ---------- | ----------------- | ------ |
| `reference` | anything | yes       | yes    | yes      | yes        | any               | S^2    |
| `blockwise` | anything | yes       | yes    | yes      | yes        | any               | S      |
| `pallas`    | GPUs     | yes       | no     | no       | no         | bfloat16, float16 | S      |
| `cudnn`     | GPUs     | no        | yes    | no       | yes        | bfloat16, float16 | S      |
| `ring`      | anything | yes       | yes    | no       | no         | any               | S      |

`documents`: whether those of a row are kept apart; GPUs are NVIDIA's. A row without documents of its own
(`starts` is None) suits all. Blockwise skips the blocks that a window or sparsity empties, cuDNN those
outside a window. `ring` is for sequences divided over `mesh.context`: there `blockwise` and `reference`
gather keys and values whole. Shapes that the kernels lack are in `refusal`. On the CPU `pallas` is
interpreted, for tests. Decoding with a cache and captured maps always take the reference.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core.errors import UserError
from llm.model.blockwise import blockwise_attention
from llm.model.config import BlockShape
from llm.model.fused import cudnn_attention, pallas_attention
from llm.model.layers import contract
from llm.model.masks import CAUSAL, Mask
from llm.model.ring import ring_attention

Backend = Literal["reference", "blockwise", "pallas", "cudnn", "ring"]
FASTEST_FIRST: tuple[Backend, ...] = ("ring", "cudnn", "pallas", "blockwise", "reference")


def choose_backend(
    asked: Literal["auto", "reference", "blockwise", "pallas", "cudnn", "ring"],
    platform: str,
    config: BlockShape,
    *,
    dtype: str,
    length: int,
    isolated: bool,
    context: int,
) -> Backend:
    """The backend for training on `platform`: the one asked for, or the fastest that takes all the rest.

    Args:
        asked: `train.attention`.
        platform: as `jax.default_backend()` names it.
        config: the model's shape.
        dtype: of the products.
        length: of a row, in tokens.
        isolated: whether the documents of a row are kept apart.
        context: how many devices a row is divided over.

    Raises:
        UserError: if the backend asked for can't do this, with the reason and one that can.
    """

    def reason(backend: Backend) -> str | None:
        return refusal(backend, platform, config, dtype, length, isolated, context)

    best = next(backend for backend in FASTEST_FIRST if reason(backend) is None)
    if asked == "auto":
        return best
    if why := reason(asked):
        raise UserError(f"train.attention is {asked}, which {why}: set it to {best} or to auto")
    return asked


def refusal(
    backend: Backend,
    platform: str,
    config: BlockShape,
    dtype: str,
    length: int,
    isolated: bool,
    context: int,
) -> str | None:
    """Why a backend can't train with this, to follow "which"; None if it can."""
    if backend in ("reference", "blockwise"):
        return None
    if backend == "ring":
        checks = [
            (context == 1, "is for sequences divided over devices (mesh.context)"),
            (not config.causal, "is causal only"),
            (config.sparsity is not None, "has no block sparsity (model.sparsity)"),
            (length % (2 * context) != 0, f"takes a multiple of {2 * context} as data.sequence_length"),
        ]
        return next((why for refuses, why in checks if refuses), None)
    size = config.head_dim
    checks = [
        (platform != "gpu", f"runs on NVIDIA GPUs, not on {platform}"),
        (config.sparsity is not None, "has no block sparsity (model.sparsity)"),
        (dtype == "float32", "has no float32 products (train.dtype)"),
        (context > 1, "needs whole sequences on each device (mesh.context)"),
    ]
    if backend == "cudnn":
        checks += [
            (isolated, "can't keep the documents of a row apart (data.isolate)"),
            (size % 8 != 0 or size > 128, f"takes a multiple of 8 up to 128 as model.head_dim, not {size}"),
        ]
    else:
        checks += [
            (not config.causal, "is causal only"),
            (config.window is not None, "has no window (model.window)"),
            (length % 128 != 0, f"takes a multiple of 128 as data.sequence_length, not {length}"),
            (not 16 <= size <= 128, f"takes a model.head_dim of 16 to 128, not {size}"),
        ]
    return next((why for refuses, why in checks if refuses), None)


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    starts: Int[Array, "B S"] | None,
    mask: Mask = CAUSAL,
    *,
    q_offset: int | jax.Array = 0,
    k_indices: Int[Array, " T"] | None = None,
    backend: Backend = "reference",
) -> Float[Array, "B S H K"]:
    """Softmax attention with grouped keys and values: softmax(q k^T / sqrt(K)) v. G divides H.

    Query i stands at index `q_offset + i` of the T keys, in a document that begins at index `starts[:, i]`
    (`document_starts`); it sees the keys that `mask` leaves of this document, or of the row if `starts` is
    None. Keys out of order have their indices in `k_indices`. For `ring` all arrays are in zigzag order, see
    `llm.model.ring`.

    Raises:
        ValueError: if `backend` can't honour the mask asked for.
    """
    if backend == "reference":
        return weighted_values(attention_weights(q, k, starts, mask, q_offset, k_indices), v)
    if not isinstance(q_offset, int) or q_offset or q.shape[1] != k.shape[1] or k_indices is not None:
        raise ValueError(f"{backend} attention needs queries and keys at the same indices: use 'reference'")
    if backend == "blockwise":
        return blockwise_attention(q, k, v, starts, mask)
    if not mask.causal and backend in ("ring", "pallas"):
        raise ValueError(f"{backend} attention is causal only: use 'blockwise' or 'reference'")
    if backend == "ring" and mask.sparsity is None:
        return ring_attention(q, k, v, jnp.zeros(q.shape[:2], jnp.int32) if starts is None else starts, mask)
    if mask.sparsity is not None:
        raise ValueError(f"{backend} attention has no block sparsity: use 'blockwise'")
    on_cpu = jax.default_backend() == "cpu"
    if backend == "pallas":
        if mask.window is not None:
            raise ValueError("pallas attention has no window: use 'blockwise'")
        return pallas_attention(q, k, v, starts, interpret=on_cpu)
    if starts is not None:
        raise ValueError("cudnn attention can't keep documents apart: use 'pallas' or 'blockwise'")
    if on_cpu:
        raise ValueError("cudnn attention runs on NVIDIA GPUs only: use 'blockwise'")
    return cudnn_attention(q, k, v, mask)


def attention_weights(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    starts: Int[Array, "B S"] | None,
    mask: Mask = CAUSAL,
    q_offset: int | jax.Array = 0,
    k_indices: Int[Array, " T"] | None = None,
) -> Float[Array, "B G H/G S T"]:
    """The attention map in float32; its rows sum to one."""
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = contract("bsgrk,btgk->bgrst", q, k, jnp.float32) * head_dim**-0.5
    i = q_offset + jnp.arange(length)[:, None]
    j = jnp.arange(k.shape[1]) if k_indices is None else k_indices
    visible = mask.visible(i, j, None if starts is None else starts[:, None, None, :, None])
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def weighted_values(
    weights: Float[Array, "B G R S T"], v: Float[Array, "B T G K"]
) -> Float[Array, "B S H K"]:
    """Sum of values under an attention map, H = G * R."""
    # The product in its own order, then transposed: asked for the other, XLA transposes all of v instead.
    out = contract("bgrst,btgk->bgrsk", weights.astype(v.dtype), v).transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
