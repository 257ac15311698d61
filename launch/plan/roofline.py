"""What a step takes in seconds: arithmetic, memory and exchanges, each at the pace of the device.

    step = max(compute + memory, hidden exchanges) + exchanges waited for + update

What moves through memory between products is added to them, since kernels run one after the other. Products
and attention run at one fraction of the dense peak, `efficiency`, fitted for each family of devices on one
published throughput (`launch.plan.calibration`): it stands for all that is not modelled, such as launches,
shapes that fill a device badly and stragglers. Exchanges of weights and gradients hide behind compute, layer
by layer, so only what passes it is felt; activations over `tensor` are waited for.
"""

from __future__ import annotations

from typing import NamedTuple

from core.devices import Device
from core.errors import UserError
from launch.plan.communication import HIDDEN, exchanges
from launch.plan.layout import Layout
from launch.plan.memory import kept_by_layer
from llm.model.config import ModelConfig
from llm.model.flops import matmul_parameters, training_flops_per_token, visible_keys

# Of the data sheet's bandwidth that large collectives reach: nccl-tests' bus bandwidth is about 0.8 of
# NVLink's on A100 and H100, and somewhat more of InfiniBand's.
LINK_EFFICIENCY = 0.8

HOST_BANDWIDTH = (
    25e9  # bytes a second each way between a device and its host: PCIe 4.0 x16 reaches about that
)


class Times(NamedTuple):
    """Seconds of a step and what they are made of; `exchanges` by mesh axis, hidden or not."""

    step: float
    compute: float
    memory: float
    exchanges: dict[str, float]
    exposed: float  # of the exchanges, what compute doesn't hide
    update: float
    mfu: float
    bound_by: str
    executed_flops: float  # on all devices, with what is computed again and in empty slots
    flops: float  # that the model needs


def times(layout: Layout, device: Device, efficiency: float | int) -> Times:
    """Predict a step on a device that reaches `efficiency` of its peak in products.

    Raises:
        UserError: if the device has no peak for the products' dtype.
    """
    train = layout.experiment.train
    peak = device.peaks.get(train.dtype)
    if peak is None:
        raise UserError(f"the device has no known peak for train.dtype {train.dtype}: use bfloat16")
    sequence = layout.experiment.data.sequence_length
    flops = layout.step_tokens * training_flops_per_token(layout.model, sequence)
    again = recomputed_flops_per_token(layout.model, sequence, train.remat)
    executed = flops + layout.step_tokens * (again + empty_flops_per_token(layout))
    compute = executed / layout.devices / (peak * efficiency)
    memory = _activation_traffic(layout) / device.memory_bandwidth
    update = _update_traffic(layout) / device.memory_bandwidth
    if layout.experiment.optimizer.offload:  # there and back at once, but after the gradients
        update += layout.optimizer_bytes / HOST_BANDWIDTH
    found = exchanges(layout)
    by_axis: dict[str, float] = {}
    hidden = waited = 0.0
    for one in found:
        seconds = one.sent / bandwidth(one.axis, layout.mesh, device)
        by_axis[one.axis] = by_axis.get(one.axis, 0.0) + seconds
        if one.what in HIDDEN:
            hidden += seconds
        else:
            waited += seconds
    busy = compute + memory
    exposed = waited + max(0.0, hidden - busy)
    step = busy + exposed + update
    parts = {"compute": compute, "memory": memory, "optimizer update": update}
    parts |= {f"communication over {axis}": seconds for axis, seconds in by_axis.items()}
    return Times(
        step, compute, memory, by_axis, exposed, update,
        mfu=flops / layout.devices / peak / step,
        bound_by=max(parts, key=lambda name: parts[name]),
        executed_flops=executed,
        flops=flops,
    )  # fmt: skip


def bandwidth(axis: str, mesh: dict[str, int], device: Device) -> float | int:
    """Bytes a second that each device sends along a mesh axis.

    Devices are numbered along the last axis first, node after node. An axis within a node has its links. One
    that leaves it has the network cards of its members there, since rings are laid through each: as many
    times a device's share of the network as it has members in a node, but no more than the links pass on.
    """
    names = list(mesh)
    stride = 1
    for inner in names[names.index(axis) + 1 :]:
        stride *= mesh[inner]
    if stride * mesh[axis] <= device.node:
        return LINK_EFFICIENCY * device.link_bandwidth
    members = max(1, device.node // stride)
    return LINK_EFFICIENCY * min(device.link_bandwidth, members * device.network_bandwidth)


def recomputed_flops_per_token(model: ModelConfig, sequence_length: int, remat: str) -> float | int:
    """Operations beyond those that the model needs: the backward pass of every fast attention forms the
    scores once more (half of the forward's products); with remat attention runs forward again, and with
    `full` so do all products of a layer but the mlp's last, which nothing reads. (What experts' last gives is
    read by the gradient of the tokens' weights.)
    """
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * visible_keys(model, sequence_length)
    if remat == "none":
        return attention / 2
    if remat == "dots":
        return attention / 2 + attention
    head = model.vocab_size * model.embed_dim
    width = model.mlp_dim if model.moe is None else model.moe.shared_mlp_dim
    last = model.num_layers * width * model.embed_dim
    return attention / 2 + attention + 2 * (matmul_parameters(model) - head - last)


def empty_flops_per_token(layout: Layout) -> float | int:
    """Operations in slots beyond the k that a token needs, since experts multiply all rows, forward, backward
    and again with `full`; below 0 where the capacity turns choices away.
    """
    model = layout.model
    if model.moe is None:
        return 0
    passes = 4 if layout.experiment.train.remat == "full" else 3
    expert = 3 * model.embed_dim * model.mlp_dim
    return passes * 2 * model.num_layers * expert * (layout.slots / layout.stream - model.moe.top_k)


def _activation_traffic(layout: Layout) -> float | int:
    """Bytes that a microbatch's passes, all of them, move to and from a device's memory, about: what a layer
    forms is written and read twice, again where it is formed again; gathered weights are written, and read by
    each pass; logits are written and read for softmax and gradient.
    """
    model, train = layout.model, layout.experiment.train
    passes = 3 if train.remat == "none" else 4
    formed = kept_by_layer(layout, "none") * 3 * (1 if train.remat == "none" else 2)
    weights = sum(p.share(layout.mesh, gathered=("fsdp",)) for p in layout.parameters if p.stacked)
    logits = 4 * layout.tokens * model.vocab_size / layout.mesh["tensor"]
    per_layer = formed + (2 + passes) * layout.width * weights
    return layout.microbatches * (model.num_layers * per_layer + 4 * logits)


def _update_traffic(layout: Layout) -> float | int:
    """Bytes that gradients and update move: sums over microbatches, the norm, and all state read and
    written.
    """
    state, train = layout.parameter_bytes, layout.experiment.train
    sums = 3 * state * layout.microbatches if layout.microbatches > 1 else 0
    average = 2 * state if train.average else 0
    return sums + 2 * state + 2 * (state + layout.optimizer_bytes) + average
