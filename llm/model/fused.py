"""Attention kernels for GPUs: cuDNN's, and Pallas' with segment ids. Neither forms an S x S matrix.

XLA can't divide such a kernel over devices: under a mesh each device runs it on its own sequences and heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core.mesh import num_shards, spec
from llm.model.masks import Mask

HEADS = ("act_batch", None, "act_heads", None)
KV_HEADS = ("act_batch", None, "act_kv_heads", None)
BLOCKS = (128, 32)  # tokens in a block of the Pallas kernel, forward and backward, or all if they are fewer


def cudnn_attention(
    q: Float[Array, "B S H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], mask: Mask
) -> Float[Array, "B S H K"]:
    """Attention across the whole row under a mask without block sparsity. G divides H."""
    kernel = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return _on_each_device(kernel, q, k, v)


def pallas_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    segments: Int[Array, "B S"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """Causal attention within segments, equal numbers anywhere in a row being one segment. G divides H.

    `interpret` runs the kernel's program on the CPU, slowly: for tests.

    Raises:
        ValueError: for a length that is no multiple of the kernel's blocks, which it would not notice itself.
    """
    from jax.experimental.pallas.ops.gpu.attention import (
        mha,
    )  # experimental: who doesn't use it needn't have it

    length = q.shape[1]
    if any(length % min(length, block) for block in BLOCKS):
        raise ValueError(f"pallas attention needs a multiple of {max(BLOCKS)} tokens, not {length}")

    def kernel(q, k, v, segments=None):
        ratio, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        k, v = (jnp.repeat(x, ratio, axis=2) for x in (k, v))
        # By place: a `custom_vjp` with static arguments.
        return mha(q, k, v, segments, scale, True, interpret=interpret)

    return _on_each_device(kernel, q, k, v, *([] if segments is None else [segments]))


def _on_each_device(kernel, q, k, v, *segments):
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, *segments)
    if num_shards("act_seq") > 1:
        raise ValueError("a sequence that is divided over devices needs 'blockwise' or 'reference' attention")
    specs = [spec(axes) for axes in (HEADS, KV_HEADS, KV_HEADS, *[("act_batch", None)] * len(segments))]
    # A Pallas kernel doesn't say over which axes its results vary: so that can't be checked.
    return jax.shard_map(kernel, in_specs=tuple(specs), out_specs=spec(HEADS), check_vma=False)(
        q, k, v, *segments
    )
