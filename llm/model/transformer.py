"""The decoder-only Transformer, from token ids to hidden states and logits.

Letters in shapes: B batch, S sequence, T cache slots, D embed, H heads, G key-value heads, K head
dimension, F mlp, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from core.mesh import shard
from core.module import Blueprint, param, stack
from llm.model import rope
from llm.model.attention import Backend, attention, attention_weights, weighted_values
from llm.model.cache import Cache, Ring, as_rows, from_rows, write
from llm.model.config import BlockShape, ModelConfig
from llm.model.layers import Linear, Norm, product, spread, stream, whole
from llm.model.masks import Mask, document_starts
from llm.model.mlp import MLP, residual_scale
from llm.model.moe import MoE, Routing
from llm.model.ragged import ExpertPath
from llm.model.ring import from_zigzag, to_zigzag

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What `product` returns, in the dtype it returns it: JAX's own policies would keep float32 sums.
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
}


@dataclass(frozen=True)
class Compute:
    """How the forward pass is carried out; none of it changes what is computed, but for rounding."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Backend = "reference"
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    experts: ExpertPath = "padded"


class Output(NamedTuple):
    hidden: Float[Array, "B S D"]
    cache: Cache | Ring | None
    aux: dict[str, jax.Array] | None
    routing: Routing | None = None  # means over layers, where the model has experts


class View(NamedTuple):
    """Where the tokens at hand stand: what every layer needs to know besides its input."""

    cos: Float[Array, "B S R"] | None = None  # None, with `sin`: nothing is rotated
    sin: Float[Array, "B S R"] | None = None
    # Index of the first token of each one's document; None: the row's first.
    starts: Int[Array, "B S"] | None = None
    q_offset: int | jax.Array = 0
    slot: int | jax.Array = 0  # of the cache, into which the first token goes
    k_indices: Int[Array, " T"] | None = None  # of a cache whose slots are out of order


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023), with rotary positions where the view has some."""

    def __init__(self, config: BlockShape, compute: Compute, rngs: nnx.Rngs):
        d, h, g, k = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias, out_bias = config.bias != "none", config.bias == "all"
        self.mask, self.backend = Mask.of(config), compute.attention
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

    def __call__(self, x, view: View, kv, capture: bool):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if view.cos is not None and view.sin is not None:
            q, k = rope.rotate(q, view.cos, view.sin), rope.rotate(k, view.cos, view.sin)
        q = shard(q, "act_batch", "act_seq", "act_heads", "act_head_dim")
        k = shard(k, "act_batch", "act_seq", "act_kv_heads", "act_head_dim")
        v = shard(v, "act_batch", "act_seq", "act_kv_heads", "act_head_dim")
        starts, batch, groups = view.starts, x.shape[0], k.shape[2]
        if kv is not None:
            kv = tuple(write(rows, new, view.slot) for rows, new in zip(kv, (k, v), strict=True))
            q, (k, v) = as_rows(q, groups), (rows[:, :, None].astype(q.dtype) for rows in kv)
            starts = None if starts is None else jnp.repeat(starts, groups, axis=0)
        weights = None
        if capture and self.backend == "ring":
            raise ValueError("captured attention maps need a model whose attention is not 'ring'")
        if capture:
            weights = attention_weights(q, k, starts, self.mask, view.q_offset, view.k_indices)
            y = weighted_values(weights, v)
            weights = weights.reshape(batch, groups, -1, *weights.shape[3:])
        else:
            y = attention(
                q, k, v, starts, self.mask,
                q_offset=view.q_offset, k_indices=view.k_indices, backend=self.backend,
            )  # fmt: skip
        if kv is not None:
            y = from_rows(y, batch)
        y = shard(y, "act_batch", "act_seq", "act_heads", "act_head_dim")
        return self.out(y), kv, weights


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(.)); both at once from x where `parallel_residual`."""

    def __init__(self, config: BlockShape, compute: Compute, rngs: nnx.Rngs):
        self.parallel = config.parallel_residual
        self.attention_norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        self.attention = Attention(config, compute, rngs)
        self.mlp_norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        dense = config.moe is None
        self.mlp = MLP(config, config.mlp_dim, rngs) if dense else MoE(config, compute.experts, rngs)

    def __call__(self, x, view: View, kv, capture: bool):
        y, kv, weights = self.attention(whole(self.attention_norm(x)), view, kv, capture)
        y, routing = x + spread(y), None
        z = self.mlp_norm(x if self.parallel else y)
        if isinstance(self.mlp, MoE):
            z, routing = self.mlp(stream(z), dropless=kv is not None)
        else:
            z = spread(self.mlp(whole(z)))
        return stream(y + z), kv, weights, routing


def scan_blocks(blocks: nnx.Module, x: Float[Array, "B S D"], view: View, compute: Compute, capture=False):
    """One after the other the blocks that `core.module.stack` made one, of any Transformer.

    Returns the last one's output, what `capture` asks for of each (see `Transformer`), and the routing's
    means over blocks; the latter two None where there are none.
    """
    graph, stacked = nnx.split(blocks)

    def body(x, params):
        x, _, weights, routing = nnx.merge(graph, params)(x, view, None, capture)
        return x, ({"attention": weights, "hidden": x} if capture else None, routing)

    if compute.remat != "none":
        policy = REMAT_POLICIES[compute.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=not compute.scan_layers)
    # Unrolled means unrolled by XLA, so that both forms are one program to read.
    unroll = 1 if compute.scan_layers else len(jax.tree.leaves(stacked)[0])
    x, (aux, routing) = jax.lax.scan(body, x, stacked, unroll=unroll)
    return x, aux, jax.tree.map(jnp.mean, routing)


class Transformer(nnx.Module):
    """Token embedding, L blocks with their parameters stacked, a final norm, an output head."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = ((config.vocab_size, config.embed_dim), ("vocab", "embed"))
        small, unit = jax.nn.initializers.normal(0.02), jax.nn.initializers.normal(1.0)
        # What the blocks add starts near unit size: a smaller embedding is drowned by it, and learns late.
        self.embedding = param(rngs, small if config.tied_head else unit, *table, decay=True)
        self.blocks = stack(lambda rngs: Block(config, compute, rngs), config.num_layers, rngs)
        self.norm = Norm(config.norm, config.embed_dim, config.norm_epsilon, rngs)
        self.head = None if config.tied_head else param(rngs, small, *table, decay=True)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None,
        cache: Cache | Ring | None = None,
        *,
        capture: bool = False,
    ) -> Output:
        """Hidden states after the final norm; tokens see only earlier ones of their own segment.

        Without segment ids a row is one segment. With a `Cache`, which needs them, the tokens are appended to
        it, and the grown one is returned. To a `Ring` one token of each row is appended, of which `positions`
        say how many the row has. With `capture` the result's `aux` holds `attention` [L, B, G, H/G, S, T] and
        `hidden` [L, B, S, D], each block's output.
        """
        if cache is None:
            starts = None if segment_ids is None else document_starts(segment_ids)
            if self.compute.attention == "ring":
                tokens, positions, starts = jax.tree.map(to_zigzag, (tokens, positions, starts))
            view = View(*rope.rotations(self.config, positions), starts, 0)
        elif isinstance(cache, Ring):
            if tokens.shape[1] != 1:
                raise ValueError(f"a ring takes one token of each row at a time, not {tokens.shape[1]}")
            newest = cache.slots - 1
            view = View(
                *rope.rotations(self.config, positions), newest - positions, newest, cache.column, cache.order
            )
        elif segment_ids is None:
            raise ValueError("tokens that a cache remembers need segment ids: 0 for padding")
        else:
            seen = jax.lax.dynamic_update_slice(cache.segments, segment_ids, (0, cache.length))
            starts = jax.lax.dynamic_slice_in_dim(
                document_starts(seen), cache.length, tokens.shape[1], axis=1
            )
            view = View(*rope.rotations(self.config, positions), starts, cache.length, cache.length)
        # Gathered over fsdp like any weight: a lookup in columns would move the activations instead.
        # Rows first, then the cast: the other way round a row's gradient would be summed in bfloat16.
        table = shard(self.embedding[...], "act_vocab", "act_embed")
        x = shard(table[tokens], "act_batch", "act_seq", "act_embed")
        x = spread(x.astype(self.compute.dtype))
        if cache is None:
            x, aux, routing = scan_blocks(self.blocks, x, view, self.compute, capture)
            hidden = whole(self.norm(x))
            if self.compute.attention == "ring":
                hidden = from_zigzag(hidden)
            return Output(hidden, None, aux, routing)
        x, k, v, aux = self._append_blocks(x, view, cache, capture)
        if isinstance(cache, Ring):
            return Output(whole(self.norm(x)), Ring(k, v, (cache.column + 1) % cache.slots), aux)
        return Output(whole(self.norm(x)), Cache(k, v, seen, cache.length + tokens.shape[1]), aux)

    def _append_blocks(self, x, view: View, cache: Cache | Ring, capture: bool):
        """Layer after layer: a scan would copy weights and cache out of their stacks at every token."""
        k, v, aux = [], [], []
        for block, *kv in zip(self.layers(), cache.k, cache.v, strict=True):
            x, (k_rows, v_rows), weights, _ = block(x, view, kv, capture)
            k.append(k_rows)
            v.append(v_rows)
            aux.append({"attention": weights, "hidden": x})
        return x, tuple(k), tuple(v), jax.tree.map(lambda *a: jnp.stack(a), *aux) if capture else None

    def layers(self) -> list[Block]:
        """The blocks one by one, out of their stack or, in a model made for decoding, as they are."""
        if isinstance(self.blocks, nnx.List):
            return list(self.blocks)
        graph, stacked = nnx.split(self.blocks)
        pick = lambda i: jax.tree.map(lambda p: p[i], stacked)  # noqa: E731
        return [cast(Block, nnx.merge(graph, pick(i))) for i in range(self.config.num_layers)]

    @property
    def head_kernel(self) -> Float[Array, "V D"]:
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Scores of the next token in float32."""
        logits = product("bsd,vd->bsv", hidden, self.head_kernel, jnp.float32)
        return shard(logits, "act_batch", "act_seq", "act_vocab")


def blueprint(config: ModelConfig, compute: Compute | None = None) -> Blueprint:
    """The abstract model: parameter metadata, initial values, and `bind` to a callable module."""
    return Blueprint.of(lambda rngs: Transformer(config, compute or Compute(), rngs))
