"""The decoder-only Transformer, from token ids to hidden states and logits.

Letters in shapes: B batch, S sequence, T cache slots, D embed, H heads, G key-value heads, K head
dimension, F mlp, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from core.mesh import shard
from core.module import Blueprint, param, stack
from llm.model import rope
from llm.model.attention import Backend, attention, attention_weights, weighted_values
from llm.model.config import ModelConfig
from llm.model.layers import Linear, Norm, product

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What `product` returns, in the dtype it returns it: JAX's own policies would keep float32 sums.
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
}


@dataclass(frozen=True)
class Compute:
    """How the forward pass is carried out; none of it changes what is computed, but for rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Backend = "reference"
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; slots from `length` on are free."""

    k: Float[Array, "L B T G K"]
    v: Float[Array, "L B T G K"]
    segments: Int[Array, "B T"]  # 0 marks a slot that holds padding
    length: Int[Array, ""]


class Output(NamedTuple):
    hidden: Float[Array, "B S D"]
    cache: Cache | None
    aux: dict[str, jax.Array] | None


class View(NamedTuple):
    """Where the tokens at hand stand: what every layer needs to know besides its input."""

    cos: Float[Array, "B S R"]
    sin: Float[Array, "B S R"]
    q_segments: Int[Array, "B S"]
    kv_segments: Int[Array, "B T"]
    q_offset: int | jax.Array


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        d, h, g, k = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias, out_bias = config.bias != "none", config.bias == "all"
        self.window, self.backend = config.window, compute.attention
        heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Linear("bsd,dhk->bshk", (d, h, k), heads, fan_in=d, bias=bias, rngs=rngs)
        self.key = Linear("bsd,dhk->bshk", (d, g, k), kv_heads, fan_in=d, bias=bias, rngs=rngs)
        self.value = Linear("bsd,dhk->bshk", (d, g, k), kv_heads, fan_in=d, bias=bias, rngs=rngs)
        self.out = Linear(
            "bshk,hkd->bsd",
            (h, k, d),
            ("heads", "head_dim", "embed"),
            fan_in=h * k,
            bias=out_bias,
            rngs=rngs,
            scale=residual_scale(config),
        )
        self.q_norm = Norm(config.norm, k, config.norm_epsilon, rngs) if config.qk_norm else None
        self.k_norm = Norm(config.norm, k, config.norm_epsilon, rngs) if config.qk_norm else None

    def __call__(self, x, view: View, layer, k_cache, v_cache, capture: bool):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, view.cos, view.sin), rope.rotate(k, view.cos, view.sin)
        q = shard(q, "act_batch", "act_seq", "act_heads", "act_head_dim")
        k = shard(k, "act_batch", "act_seq", "act_kv_heads", "act_head_dim")
        v = shard(v, "act_batch", "act_seq", "act_kv_heads", "act_head_dim")
        if k_cache is not None:
            start = (layer, 0, view.q_offset, 0, 0)
            k_cache = jax.lax.dynamic_update_slice(k_cache, k[None].astype(k_cache.dtype), start)
            v_cache = jax.lax.dynamic_update_slice(v_cache, v[None].astype(v_cache.dtype), start)
            k, v = k_cache[layer].astype(q.dtype), v_cache[layer].astype(q.dtype)
        masks = (view.q_segments, view.kv_segments)
        weights = None
        if capture:
            weights = attention_weights(q, k, *masks, self.window, view.q_offset)
            y = weighted_values(weights, v)
        else:
            y = attention(q, k, v, *masks, window=self.window, q_offset=view.q_offset, backend=self.backend)
        y = shard(y, "act_batch", "act_seq", "act_heads", "act_head_dim")
        return self.out(y), k_cache, v_cache, weights


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), or two layers with GELU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f, bias = config.embed_dim, config.mlp_dim, config.bias == "all"
        into, out = ("embed", "mlp"), ("mlp", "embed")
        gated = config.activation == "swiglu"
        self.gate = Linear("bsd,df->bsf", (d, f), into, fan_in=d, bias=bias, rngs=rngs) if gated else None
        self.up = Linear("bsd,df->bsf", (d, f), into, fan_in=d, bias=bias, rngs=rngs)
        scale = residual_scale(config)
        self.down = Linear("bsf,fd->bsd", (f, d), out, fan_in=f, bias=bias, rngs=rngs, scale=scale)

    def __call__(self, x):
        up = self.up(x)
        y = jax.nn.gelu(up, approximate=False) if self.gate is None else jax.nn.silu(self.gate(x)) * up
        return self.down(shard(y, "act_batch", "act_seq", "act_mlp"))


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(.)); both at once from x where `parallel_residual`."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        self.parallel = config.parallel_residual
        self.attention_norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        self.attention = Attention(config, compute, rngs)
        self.mlp_norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, view: View, layer, k_cache, v_cache, capture: bool):
        y, k_cache, v_cache, weights = self.attention(
            self.attention_norm(x), view, layer, k_cache, v_cache, capture
        )
        y = x + y
        y = y + self.mlp(self.mlp_norm(x if self.parallel else y))
        return shard(y, "act_batch", "act_seq", "act_embed"), k_cache, v_cache, weights


class Transformer(nnx.Module):
    """Token embedding, L blocks with their parameters stacked, a final norm, an output head."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = ((config.vocab_size, config.embed_dim), ("vocab", "embed"))
        init = jax.nn.initializers.normal(0.02)
        self.embedding = param(rngs, init, *table, decay=True)
        self.blocks = stack(lambda rngs: Block(config, compute, rngs), config.num_layers, rngs)
        self.norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        self.head = None if config.tied_head else param(rngs, init, *table, decay=True)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        cache: Cache | None = None,
        *,
        capture: bool = False,
    ) -> Output:
        """Hidden states after the final norm; tokens see only earlier ones of their own segment.

        With a `cache` the tokens are appended to it, and the grown one is returned. With `capture` the
        result's `aux` holds `attention` [L, B, G, H/G, S, T] and `hidden` [L, B, S, D], each block's output.
        """
        cos, sin = rope.rotations(self.config, positions)
        if cache is None:
            view = View(cos, sin, segment_ids, segment_ids, 0)
        else:
            seen = jax.lax.dynamic_update_slice(cache.segments, segment_ids, (0, cache.length))
            view = View(cos, sin, segment_ids, seen, cache.length)
        # Gathered over fsdp like any weight: a lookup in columns would move the activations instead.
        # Rows first, then the cast: the other way round a row's gradient would be summed in bfloat16.
        table = shard(self.embedding[...], "act_vocab", "act_embed")
        x = table[tokens].astype(self.compute.dtype)
        x = shard(x, "act_batch", "act_seq", "act_embed")
        x, k, v, aux = self._run_blocks(x, view, cache, capture)
        if cache is not None:
            cache = Cache(k, v, view.kv_segments, cache.length + tokens.shape[1])
        return Output(self.norm(x), cache, aux)

    def _run_blocks(self, x, view: View, cache: Cache | None, capture: bool):
        graph, stacked = nnx.split(self.blocks)

        def body(carry, layer):
            index, params = layer
            x, k, v, weights = nnx.merge(graph, params)(carry[0], view, index, *carry[1:], capture)
            return (x, k, v), {"attention": weights, "hidden": x} if capture else None

        if self.compute.remat != "none":
            policy = REMAT_POLICIES[self.compute.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.compute.scan_layers)
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        layers = (jnp.arange(self.config.num_layers), stacked)
        # Unrolled means unrolled by XLA, so that both forms are one program to read.
        unroll = 1 if self.compute.scan_layers else self.config.num_layers
        (x, k, v), aux = jax.lax.scan(body, carry, layers, unroll=unroll)
        return x, k, v, aux

    @property
    def head_kernel(self) -> Float[Array, "V D"]:
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Scores of the next token in float32."""
        logits = product("bsd,vd->bsv", hidden, self.head_kernel, jnp.float32)
        return shard(logits, "act_batch", "act_seq", "act_vocab")


def residual_scale(config: ModelConfig) -> float:
    """Initial shrinking of the products that add to the residual stream (Radford et al. 2019)."""
    return 1 / math.sqrt(2 * config.num_layers)


def blueprint(config: ModelConfig, compute: Compute | None = None) -> Blueprint:
    """The abstract model: parameter metadata, initial values, and `bind` to a callable module."""
    return Blueprint.of(lambda rngs: Transformer(config, compute or Compute(), rngs))


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: str = "float32") -> Cache:
    """A cache for `slots` tokens of each of `batch` sequences."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32), jnp.int32(0)
    )
