"""The image tower: a Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

Letters in shapes: B batch, N patches, P pixels of a patch's side, D embed, E joint space, H heads, K head
dimension.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from clip.model.config import ImageConfig
from clip.model.towers import tower_blocks
from core.mesh import shard
from core.module import param
from llm.model.attention import attention
from llm.model.layers import Linear, Norm, spread, whole
from llm.model.masks import Mask
from llm.model.mlp import MLP
from llm.model.transformer import Compute, View, scan_blocks


def pixels(images: UInt8[Array, "B H W 3"], config: ImageConfig) -> Float[Array, "B H W 3"]:
    """Bytes as the model takes them: from 0 to 1, less the mean, over the deviation of each colour."""
    return (images.astype(jnp.float32) / 255 - jnp.array(config.mean)) / jnp.array(config.std)


class ImageTower(nnx.Module):
    """Patches with learned positions, blocks without a mask, and one vector of their output."""

    def __init__(self, config: ImageConfig, joint_dim: int, compute: Compute, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        d, p, of_class = config.embed_dim, config.patch_size, config.pool == "class"
        init = jax.nn.initializers.normal(d**-0.5)
        # The convolution of others: its kernel is as wide as its stride, so it is a product.
        self.patches = Linear(
            "bnhwc,hwcd->bnd",
            (p, p, 3, d),
            ("patch", "patch", "patch", "embed"),
            fan_in=3 * p * p,
            bias=not of_class,
            rngs=rngs,
            scale=3**-0.5,
        )
        self.token = param(rngs, init, (d,), ("embed",), decay=False) if of_class else None
        self.positions = param(rngs, init, (config.num_positions, d), ("positions", "embed"), decay=True)
        self.norm_in = Norm("layer", d, config.norm_epsilon, rngs) if of_class else None
        self.blocks = tower_blocks(config, compute, rngs)
        self.norm = Norm("layer", d, config.norm_epsilon, rngs)
        self.head = None if of_class else AttentionPool(config, rngs)
        self.projection = (
            Linear("bd,de->be", (d, joint_dim), ("embed", "joint"), fan_in=d, bias=False, rngs=rngs)
            if of_class
            else None
        )

    def __call__(self, pixels: Float[Array, "B H W 3"], key: Key[Array, ""] | None) -> Float[Array, "B E"]:
        """The projected embeddings in float32, not yet of unit length. A `key` drops patches."""
        x, offset = cut(pixels, self.config), self.config.num_positions - self.config.num_patches
        positions = shard(self.positions[...], None, "act_embed")
        places = positions[offset:]
        if key is not None and self.config.patch_dropout:
            # Before the first product, so that what is left out costs nothing. The class token stays.
            kept = keep(key, x.shape[0], self.config)
            x = jnp.take_along_axis(x, kept[:, :, None, None, None], axis=1)
            places = places[kept]
        x = self.patches(shard(x.astype(self.compute.dtype), "act_batch", "act_seq", None, None, None))
        # In float32, so that the positions' gradients are float32 sums over images.
        x = x.astype(jnp.float32) + places
        if self.token is not None:
            token = shard(self.token[...], "act_embed") + positions[0]
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, len(token))), x], axis=1)
        x = x if self.norm_in is None else self.norm_in(x)
        x = spread(shard(x.astype(self.compute.dtype), "act_batch", "act_seq", "act_embed"))
        x, _, _ = scan_blocks(self.blocks, x, View(), self.compute)
        if self.head is not None:
            return self.head(whole(self.norm(x))).astype(jnp.float32)
        assert self.projection is not None
        return self.projection(self.norm(x[:, 0].astype(jnp.float32)))


class AttentionPool(nnx.Module):
    """A learned query attends to all patches; its answer passes an MLP with a residual (SigLIP's head)."""

    def __init__(self, config: ImageConfig, rngs: nnx.Rngs):
        d, h, k = config.embed_dim, config.num_heads, config.head_dim
        axes, back = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.probe = param(rngs, jax.nn.initializers.normal(d**-0.5), (d,), ("embed",), decay=False)
        self.query = Linear("bsd,dhk->bshk", (d, h, k), axes, fan_in=d, bias=True, rngs=rngs)
        self.key = Linear("bsd,dhk->bshk", (d, h, k), axes, fan_in=d, bias=True, rngs=rngs)
        self.value = Linear("bsd,dhk->bshk", (d, h, k), axes, fan_in=d, bias=True, rngs=rngs)
        self.out = Linear("bshk,hkd->bsd", (h, k, d), back, fan_in=d, bias=True, rngs=rngs)
        self.norm = Norm("layer", d, config.norm_epsilon, rngs)
        self.mlp = MLP(config, config.mlp_dim, rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        probe = shard(self.probe[...], "act_embed").astype(x.dtype)
        q = jnp.broadcast_to(self.query(probe[None, None]), (x.shape[0], 1, *self.query.kernel.shape[1:]))
        k, v = self.key(x), self.value(x)
        q, k, v = (shard(part, "act_batch", "act_seq", "act_heads", "act_head_dim") for part in (q, k, v))
        # One query of all keys, which only the reference takes.
        y = self.out(attention(q, k, v, None, Mask(causal=False)))
        return (y + self.mlp(self.norm(y)))[:, 0]


def cut(pixels: Float[Array, "B H W 3"], config: ImageConfig) -> Float[Array, "B N P P 3"]:
    """The patches, row after row.

    Raises:
        ValueError: for images of another size than `config.size`.
    """
    batch, height, width, _ = pixels.shape
    if (height, width) != (config.size, config.size):
        raise ValueError(f"images of {height} x {width} pixels, and the model takes {config.size} a side")
    p, side = config.patch_size, config.size // config.patch_size
    x = pixels.reshape(batch, side, p, side, p, 3).swapaxes(2, 3)
    return x.reshape(batch, side * side, p, p, 3)


def keep(key: Key[Array, ""], batch: int, config: ImageConfig) -> Int[Array, "B K"]:
    """Which patches of each image are kept, drawn anew for each: at least one."""
    count = max(1, math.floor(config.num_patches * (1 - config.patch_dropout) + 1e-9))
    draws = jax.random.uniform(key, (batch, config.num_patches))
    return jax.lax.top_k(shard(draws, "act_batch", None), count)[1]
