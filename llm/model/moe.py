"""Mixture of experts: of `num_experts` MLPs each token takes the `top_k` that a router prefers.

    p = softmax(router · x),    y = sum over the top k experts e of  w_e · expert_e(x)   (+ shared(x))

where w is p, or p divided by its sum over the chosen (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al.
2024, arXiv:2401.04088; shared experts: Dai et al. 2024, arXiv:2401.06066).

Every device lays its tokens out in slots, C for each expert; with experts on several devices one `all_to_all`
takes the slots to them and another back. What lies between are products over whole arrays, as in any MLP. A
token that finds no slot at an expert goes without it: with none at all the residual passes it by. With C = T
there is a slot for all, and nothing is dropped.

Letters beside those of transformer.py: E experts, k choices of a token, T tokens of a device, C slots for an
expert of tokens of a device, N = E C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from core.mesh import AXES, num_shards, shard, spec
from core.module import param
from llm.model.config import BlockShape
from llm.model.layers import Linear, product, spread, swiglu, whole
from llm.model.mlp import MLP, residual_scale
from llm.model.ragged import ExpertPath, ragged_experts
from llm.model.slots import Slots, collect, lay_out, queue

STREAM = ("act_batch", "act_stream", None)


class Routing(NamedTuple):
    """How evenly the router spreads the tokens: scalars, of one layer or their means over layers.

    All tokens of the batch count alike, also those without weight in the loss: they take an expert's time.
    """

    balance_loss: Float[Array, ""]  # E sum_e f_e p_e: f_e choices of e a token, p_e mean; k when even
    router_z_loss: Float[Array, ""]  # mean log(sum exp(logits))^2 (Zoph et al. 2022, arXiv:2202.08906)
    dropped_fraction: Float[Array, ""]  # of the k choices of each token, those that found no slot


class MoE(nnx.Module):
    """Experts of `mlp_dim` with SwiGLU, and the router that chooses among them."""

    def __init__(self, config: BlockShape, path: ExpertPath, rngs: nnx.Rngs):
        assert config.moe is not None
        self.options, self.path = config.moe, path
        d, f, e = config.embed_dim, config.mlp_dim, self.options.num_experts
        into, out = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        init = jax.nn.initializers.truncated_normal(1 / math.sqrt(d))
        self.router = param(rngs, init, (d, e), ("embed", "experts"), decay=True)
        self.gate = Linear("ecd,edf->ecf", (e, d, f), into, fan_in=d, bias=False, rngs=rngs)
        self.up = Linear("ecd,edf->ecf", (e, d, f), into, fan_in=d, bias=False, rngs=rngs)
        scale = residual_scale(config)
        self.down = Linear("ecf,efd->ecd", (e, f, d), out, fan_in=f, bias=False, rngs=rngs, scale=scale)
        width = self.options.shared_mlp_dim
        self.shared = MLP(config, width, rngs) if width else None

    def __call__(
        self, x: Float[Array, "B S D"], *, dropless: bool = False
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """The weighted sum, laid out like x, as `stream` does; with `dropless` whatever the capacity."""
        router = shard(self.router[...], "act_embed", None)
        logits = shard(product("bsd,de->bse", x.astype(jnp.float32), router), *STREAM)
        probabilities = jax.nn.softmax(logits)
        weights, experts = self._choose(probabilities)
        if self.path == "ragged" and not dropless:
            kernels = self.gate.kernel[...], self.up.kernel[...], self.down.kernel[...]
            y, counts = ragged_experts(x, experts, weights, *kernels)
            dropped = jnp.zeros(())
        else:
            y, counts, dropped = self._padded(x, experts, weights, dropless)
        if self.shared is not None:
            y = y + spread(self.shared(whole(x)))
        share = counts / math.prod(x.shape[:2])
        balance = self.options.num_experts * jnp.sum(share * probabilities.mean((0, 1)))
        z_loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        return y, Routing(balance, z_loss, dropped)

    def _choose(self, probabilities):
        """The weights [B, S, k] and numbers of each token's experts."""

        def choose(probabilities):
            weights, experts = jax.lax.top_k(probabilities, self.options.top_k)
            total = weights.sum(-1, keepdims=True) if self.options.normalize_top_k else 1.0
            return weights / total, experts

        if tokens_divide(probabilities):  # XLA would gather them all for `top_k`
            choose = jax.shard_map(choose, in_specs=spec(STREAM), out_specs=spec(STREAM))
        return choose(probabilities)

    def _padded(self, x, experts, weights, dropless: bool):
        """The sum [B, S, D], how often each expert was chosen [E], and the share of choices dropped."""
        divided = tokens_divide(x)
        devices = num_shards("act_batch") * num_shards("act_stream") if divided else 1
        exchange = divided and num_shards("act_experts") > 1
        capacity = self.options.slots(math.prod(x.shape[:2]) // devices, dropless)

        def to_experts(x, experts):
            tokens = x.shape[0] * x.shape[1]
            order, counts = queue(experts.reshape(tokens, -1), self.options.num_experts)
            slots = Slots.of(experts.reshape(tokens, -1), order, counts, capacity)
            rows = lay_out(x.reshape(tokens, -1), slots).reshape(-1, capacity, x.shape[-1])
            if exchange:
                rows = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=1, tiled=True)
            return rows, slots, counts[None]

        def from_experts(rows, weights, slots):
            if exchange:
                rows = jax.lax.all_to_all(rows, "expert", split_axis=1, concat_axis=0, tiled=True)
            flat = weights.reshape(-1, weights.shape[-1])
            return collect(rows.reshape(-1, rows.shape[-1]), flat, slots).reshape(*weights.shape[:2], -1)

        if divided:
            here, there = spec(STREAM), spec(("act_experts", "act_slot_stream", None))
            own = PartitionSpec(AXES)  # each device's
            to_experts = jax.shard_map(to_experts, in_specs=(here, here), out_specs=(there, own, own))
            from_experts = jax.shard_map(from_experts, in_specs=(there, here, own), out_specs=here)

        rows, slots, counts = to_experts(x, experts)
        rows = shard(rows, "act_experts", "act_slots", "act_embed")
        hidden = shard(swiglu(self.gate(rows), self.up(rows)), "act_experts", "act_slots", "act_mlp")
        rows = shard(self.down(hidden), "act_experts", "act_slots", "act_embed")
        rows = shard(rows, "act_experts", "act_slot_stream", "act_embed")
        dropped = jnp.maximum(counts - capacity, 0).sum() / experts.size
        return from_experts(rows, weights, slots), counts.sum(0), dropped


def tokens_divide(x: Float[Array, "B S D"]) -> bool:
    """Whether there is a mesh whose devices can hold equally many of these tokens.

    A step's tokens do; few tokens, as in decoding, are left to XLA as one array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return False
    return x.shape[0] % num_shards("act_batch") == 0 == x.shape[1] % num_shards("act_stream")
