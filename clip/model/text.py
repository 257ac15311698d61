"""The text tower: the language model's blocks over the tokens of a caption, with learned positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip.model.config import TextConfig
from clip.model.towers import tower_blocks
from core.mesh import shard
from core.module import param
from llm.model.layers import Linear, Norm, spread
from llm.model.transformer import Compute, View, scan_blocks


class TextTower(nnx.Module):
    """Token embeddings with learned positions, blocks, a norm, and the projection of one token."""

    def __init__(self, config: TextConfig, joint_dim: int, compute: Compute, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        d, normal = config.embed_dim, jax.nn.initializers.normal
        self.embedding = param(rngs, normal(0.02), (config.vocab_size, d), ("vocab", "embed"), decay=True)
        self.positions = param(rngs, normal(0.01), (config.length, d), ("positions", "embed"), decay=True)
        self.blocks = tower_blocks(config, compute, rngs)
        self.norm = Norm("layer", d, config.norm_epsilon, rngs)
        bias = config.pool == "last"
        self.projection = Linear(
            "bd,de->be", (d, joint_dim), ("embed", "joint"), fan_in=d, bias=bias, rngs=rngs
        )

    def __call__(self, tokens: Int[Array, "B T"], ends: Int[Array, " B"]) -> Float[Array, "B E"]:
        """The projected embeddings in float32, not yet of unit length. `ends`: where each text ends.

        Raises:
            ValueError: for more tokens than `config.length`.
        """
        length = tokens.shape[1]
        if length > self.config.length:
            raise ValueError(f"captions of {length} tokens, and the model takes {self.config.length}")
        # As in the language model: the table gathered over fsdp, rows looked up, then the cast.
        table = shard(self.embedding[...], "act_vocab", "act_embed")
        positions = shard(self.positions[...], None, "act_embed")
        x = shard(table[tokens] + positions[:length], "act_batch", "act_seq", "act_embed")
        x = spread(x.astype(self.compute.dtype))
        x, _, _ = scan_blocks(self.blocks, x, View(), self.compute)
        if self.config.pool == "end":
            pooled = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        else:
            pooled = x[:, -1]
        return self.projection(self.norm(pooled.astype(jnp.float32)))
