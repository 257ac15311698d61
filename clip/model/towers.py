"""What both towers are built of: the language model's blocks, drawn as OpenAI's CLIP draws them."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip.model.config import ImageConfig, TextConfig
from core.module import stack
from llm.model.transformer import Block, Compute


def tower_blocks(config: ImageConfig | TextConfig, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
    """The tower's blocks as one, to be run by `llm.model.transformer.scan_blocks`.

    Kernels are normal with the deviations of `CLIP.initialize_parameters` (openai/CLIP, clip/model.py). That
    leaves the image tower to PyTorch's defaults; here both have these, which shrink with depth.
    """
    blocks = cast(Block, stack(lambda rngs: Block(config, compute, rngs), config.num_layers, rngs))
    attention, mlp, d = blocks.attention, blocks.mlp, config.embed_dim
    residual = (2 * config.num_layers * d) ** -0.5
    deviations = [
        *((linear, d**-0.5) for linear in (attention.query, attention.key, attention.value)),
        (attention.out, residual),
        (mlp.up, (2 * d) ** -0.5),
        (mlp.down, residual),
    ]
    for linear, deviation in deviations:
        kernel = linear.kernel
        kernel[...] = deviation * jax.random.normal(rngs.params(), kernel.shape)
    return blocks


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows at length 1; zeros stay."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
