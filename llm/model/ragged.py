"""Experts without slots: only rows that exist are sent and multiplied, however uneven. For GPUs: on a CPU XLA
has no `ragged_all_to_all`, and JAX makes of `ragged_dot` one masked product over all experts.

The rows that a device receives have no bound but the worst case, that all devices' tokens choose its experts:
that much memory is set aside, and only what arrives is computed.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from core.errors import UserError
from core.mesh import AXES, num_shards, spec
from llm.model.config import MoEConfig
from llm.model.layers import swiglu
from llm.model.slots import Slots, collect, inverse, lay_out, queue

ExpertPath = Literal["padded", "ragged"]


def check_path(path: ExpertPath, platform: str, moe: MoEConfig | None) -> None:
    """Whether `train.experts` can be carried out on a platform, as `jax.default_backend()` names it.

    Raises:
        UserError: if not, with what to set.
    """
    if path == "padded":
        return
    if moe is None:
        raise UserError(
            "train.experts is ragged, but the model has no experts: leave it out, or set model.moe"
        )
    if platform != "gpu":
        raise UserError(
            f"train.experts is ragged, which needs a GPU, and this is a {platform}: set it to padded"
        )
    if moe.capacity is not None:
        raise UserError(
            "train.experts is ragged, which drops nothing, and model.moe.capacity is "
            f"{moe.capacity:g}: set that to null, or train.experts to padded"
        )


def ragged_experts(
    x: Float[Array, "B S D"],
    experts: Int[Array, "B S k"],
    weights: Float[Array, "B S k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> tuple[Float[Array, "B S D"], Int[Array, " E"]]:
    """Each token's weighted sum of its experts, and how often each expert was chosen."""
    num_experts, devices = gate.shape[0], num_shards("act_experts")
    divided = not jax.sharding.get_abstract_mesh().empty

    def local(x, experts, weights, gate, up, down):
        batch, length, width = x.shape
        flat = experts.reshape(batch * length, -1)
        order, counts = queue(flat, num_experts)
        slots = Slots(inverse(order).reshape(flat.shape), order)
        rows = lay_out(x.reshape(-1, width), slots)
        if devices > 1:
            most = flat.shape[0] * min(flat.shape[1], num_experts // devices)
            rows, sizes, give_back = _exchange(rows, counts, devices * most)
        else:
            sizes = counts
        up_rows = _grouped(rows, up, sizes, 1 if divided else None)
        hidden = swiglu(_grouped(rows, gate, sizes, 1 if divided else None), up_rows)
        rows = _grouped(hidden, down, sizes, 2 if divided else None)
        if devices > 1:
            rows = give_back(rows)
        y = collect(rows, weights.reshape(flat.shape), slots).reshape(x.shape)
        if divided:  # each has a part of the experts' width, and takes the sum for a part of the sequence
            y = jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        return y, counts[None]

    if divided:
        tokens, kernels = spec(("act_batch", "act_seq", None)), ("experts", "embed", "mlp")
        local = jax.shard_map(
            local,
            in_specs=(
                tokens,
                tokens,
                tokens,
                spec(kernels),
                spec(kernels),
                spec(kernels[:1] + kernels[:0:-1]),
            ),
            out_specs=(spec(("act_batch", "act_stream", None)), PartitionSpec(_token_axes())),
            check_vma=False,  # the sums over devices that its checks would ask for are written out
        )
    y, counts = local(x, experts, weights, gate, up, down)
    return y, counts.sum(0)


def _token_axes() -> tuple[str, ...]:
    return tuple(axis for axis in AXES if axis != "tensor")


def _exchange(rows: Float[Array, "n D"], counts: Int[Array, " E"], size: int):
    """Send each expert's rows to its device.

    Returns what came for the experts here, by expert, [size, D]; how many rows each has; and the function
    that takes rows in this order back to where they came from, [n, D].
    """
    devices, me = jax.lax.axis_size("expert"), jax.lax.axis_index("expert")
    # [from, to, expert there]: every device knows all the counts, and so where each one's rows go
    table = jax.lax.all_gather(counts, "expert").reshape(devices, devices, -1)
    sizes = table.sum(-1)
    before = lambda x, axis: jnp.cumsum(x, axis) - x  # noqa: E731
    leave, arrive = before(sizes, 1), before(sizes, 0)
    sent = leave[me], sizes[me], arrive[me], sizes[:, me]
    empty = jnp.zeros((size, rows.shape[1]), rows.dtype)
    rows_by_sender = jax.lax.ragged_all_to_all(rows, empty, *sent, axis_name="expert")

    here = table[:, me]  # [from, expert]
    ids = jnp.tile(jnp.arange(here.shape[1]), devices)
    ids = jnp.repeat(ids, here.reshape(-1), total_repeat_length=size)
    ids = jnp.where(jnp.arange(size) < here.sum(), ids, here.shape[1])
    order = jnp.argsort(ids, stable=True)
    by_expert = Slots(inverse(order)[:, None], order)

    def give_back(rows_by_expert):
        back = lay_out(rows_by_expert, Slots(order[:, None], by_expert.slot[:, 0]))
        received = arrive[:, me], sizes[:, me], leave[:, me], sizes[me]
        return jax.lax.ragged_all_to_all(back, jnp.zeros_like(rows), *received, axis_name="expert")

    return lay_out(rows_by_sender, by_expert), here.sum(0), give_back


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Float[Array, "n I"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], embed: int | None):
    """Rows in groups of `sizes` times each group's kernel, by the rules of `contract`: operands in x's dtype,
    w's gradient a float32 sum. `embed` is the axis of w that is divided over fsdp; None without a mesh.
    """
    return _ragged_dot(x, _gathered(x, w, embed), sizes)


def _gathered(x, w, embed: int | None):
    w = w.astype(x.dtype)
    return w if embed is None else jax.lax.all_gather(w, "fsdp", axis=embed, tiled=True)


def _ragged_dot(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _grouped_backward(embed, residuals, g):
    x, w, sizes = residuals
    g = g.astype(x.dtype)
    dx = _ragged_dot(g, _gathered(x, w, embed).swapaxes(1, 2), sizes)
    rows = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    dw = jax.lax.ragged_dot_general(x, g, sizes, rows, preferred_element_type=jnp.float32)
    if embed is not None:
        dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=embed, tiled=True)
    return dx, dw.astype(w.dtype), None


_grouped.defvjp(lambda x, w, sizes, embed: (_grouped(x, w, sizes, embed), (x, w, sizes)), _grouped_backward)
