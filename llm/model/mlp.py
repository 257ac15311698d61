"""The part of a block that works on each token alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from flax import nnx

from core.mesh import shard
from llm.model.config import BlockShape
from llm.model.layers import Linear, swiglu

GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), or two layers with GELU or what stands for it."""

    def __init__(self, config: BlockShape, width: int, rngs: nnx.Rngs):
        d, f, bias = config.embed_dim, width, config.bias == "all"
        into, out = ("embed", "mlp"), ("mlp", "embed")
        self.activation = config.activation
        gated = self.activation == "swiglu"
        self.gate = Linear("bsd,df->bsf", (d, f), into, fan_in=d, bias=bias, rngs=rngs) if gated else None
        self.up = Linear("bsd,df->bsf", (d, f), into, fan_in=d, bias=bias, rngs=rngs)
        scale = residual_scale(config)
        self.down = Linear("bsf,fd->bsd", (f, d), out, fan_in=f, bias=bias, rngs=rngs, scale=scale)

    def __call__(self, x):
        up = self.up(x)
        y = GELUS[self.activation](up) if self.gate is None else swiglu(self.gate(x), up)
        return self.down(shard(y, "act_batch", "act_seq", "act_mlp"))


def residual_scale(config: BlockShape) -> float:
    """Initial shrinking of the products that add to the residual stream (Radford et al. 2019)."""
    return 1 / math.sqrt(2 * config.num_layers)
