"""What crosses the mesh in one step: each exchange of the training step, as XLA's partitioner lays it out.

Letters as in `layout`; b, s are the rows and positions of a microbatch on one device. `tests/launch` holds
every term to what is counted in compiled programs (`launch.plan.program`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from core.mesh import AXES
from launch.plan.layout import Layout, Parameter
from launch.plan.program import ring_bytes

# These cross while products run: weights and gradients of a layer beside its neighbour's, keys and values
# beside attention to those that came before. Activations are waited for.
HIDDEN = ("weights", "gradients", "keys and values")


class Exchange(NamedTuple):
    """An array of `size` bytes, whole as in `program.Collective`, exchanged along one mesh axis."""

    what: str
    kind: str
    axis: str
    devices: int
    size: int
    times: int  # in a step

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step."""
        return self.times * ring_bytes(self.kind, self.size, self.devices)


def exchanges(layout: Layout) -> list[Exchange]:
    """All exchanges of a step; those along axes of one device are left out."""
    parts = (_weights, _gradients, _stream, _experts, _ring, _loss)
    found = [one for part in parts for one in part(layout)]
    return [one for one in found if one.devices > 1 and one.times and one.size]


def sent_by_axis(found: list[Exchange]) -> dict[str, float]:
    """Bytes that each device sends in a step, by mesh axis."""
    totals: dict[str, float] = {}
    for one in found:
        totals[one.axis] = totals.get(one.axis, 0.0) + one.sent
    return totals


def _weights(layout: Layout) -> Iterator[Exchange]:
    """Each kernel is gathered over `fsdp` in the products' dtype, for each microbatch once forward and once
    backward: what is computed again and the backward pass read the same gathered arrays. The table of
    embeddings is gathered once, in float32, since rows are looked up before they are cast; the head once.
    Experts stay divided over `expert`. A router is gathered over it, in float32, and again with remat.
    """
    n, runs = layout.mesh["fsdp"], layout.microbatches
    for p in layout.parameters:
        if "fsdp" not in p.divided:
            continue
        whole = p.share(layout.mesh, gathered=("fsdp",))
        if p.of_router:
            times = layout.model.num_layers * runs * (1 if layout.experiment.train.remat == "none" else 2)
            experts, part = layout.mesh["expert"], p.share(layout.mesh, gathered=("expert",))
            yield Exchange("weights", "all-gather", "expert", experts, 4 * part, times)
            yield Exchange("weights", "all-gather", "fsdp", n, 4 * p.size, times)
        elif p.stacked:
            bias = p.path.endswith("bias")  # added in float32, and no product of the backward pass reads it
            times = layout.model.num_layers * runs * (1 if bias else 2)
            yield Exchange("weights", "all-gather", "fsdp", n, (4 if bias else layout.width) * whole, times)
        if p.path == "embedding":
            yield Exchange("weights", "all-gather", "fsdp", n, 4 * whole, runs)
        if p.path == "head" or (p.path == "embedding" and layout.model.tied_head):
            yield Exchange("weights", "all-gather", "fsdp", n, layout.width * whole, runs)


def _gradients(layout: Layout) -> Iterator[Exchange]:
    """Each microbatch's gradients are summed in float32 over all axes that its tokens are divided over: what
    `fsdp` divides is scattered there first, so that the sums over the others are of parts. Tokens come to
    their experts along `expert`, so those kernels' gradients are not summed there. A router's are summed
    whole, like a norm's.
    """
    for p in layout.parameters:
        runs = layout.microbatches * (layout.model.num_layers if p.stacked else 1)
        if p.path == "embedding" and layout.model.tied_head:
            runs *= 2  # as a table and as the head
        gathered = ("fsdp", "expert") if p.of_router else ("fsdp",)
        size, n = 4 * p.share(layout.mesh, gathered), layout.mesh
        scattered = "fsdp" in p.divided and not p.of_router
        of_stream = "norm" in p.axes or p.of_router or _added_to_stream(p)  # which `tensor` divides too
        table = p.path == "embedding"  # scattered into while the sequence's parts are still apart
        if scattered and not (of_stream or table):
            yield Exchange("gradients", "reduce-scatter", "fsdp", n["fsdp"], size, runs)
            size //= n["fsdp"]
        # Some sums follow each other, some are one over several axes, which `program` tells apart like this.
        apart = of_stream or table or not (p.path == "head" or p.of_expert or n["fsdp"] > 1)
        if apart:
            yield Exchange("gradients", "all-reduce", "context", n["context"], size, runs)
        if of_stream:
            yield Exchange("gradients", "all-reduce", "tensor", n["tensor"], size // n["context"], runs)
        if (of_stream or table) and scattered:
            yield Exchange("gradients", "reduce-scatter", "fsdp", n["fsdp"], size, runs)
            size //= n["fsdp"]
        for axis in ("expert", *(() if apart else ("context",)), *(() if scattered else ("fsdp",)), "data"):
            if axis != "expert" or not p.of_expert:
                yield Exchange("gradients", "all-reduce", axis, n[axis], size, runs)
                size //= n[axis]


def _added_to_stream(p: Parameter) -> bool:
    return p.axes[-1] == "embed" and p.path.endswith("bias")


def _stream(layout: Layout) -> Iterator[Exchange]:
    """The residual stream lies divided over `tensor` along the sequence (Korthikanti et al. 2022): gathered
    before attention and mlp, the partial sums that they end with scattered; backward the other way round.
    With remat the gathered inputs are gathered anew, and `full` forms attention's output again where the mlp
    reads it. (What `none` keeps is gathered already.) Experts read slots instead, see `_experts`.
    """
    model, n = layout.model, layout.mesh["tensor"]
    size, runs = layout.width * layout.tokens * model.embed_dim, layout.microbatches * model.num_layers
    remat, parallel = layout.experiment.train.remat, model.parallel_residual
    readers = 2 if model.moe is None or model.moe.shared_mlp_dim else 1
    backward = 1 if parallel else readers  # parallel: one gradient serves both
    gathers = readers + backward + (0 if remat == "none" else readers)
    scatters = 2 * readers + (1 if remat == "full" and not parallel else 0)
    if remat == "dots" and layout.mesh["context"] > 1 and not parallel:
        gathers += 2  # attention's output is summed whole before what is kept of it is cut, and gathered anew
    yield Exchange("activations", "all-gather", "tensor", n, size, runs * gathers)
    yield Exchange("activations", "reduce-scatter", "tensor", n, size, runs * scatters)


def _experts(layout: Layout) -> Iterator[Exchange]:
    """Slots go to their experts and back, all of them, filled or not, and their gradients as well; with remat
    forward twice. On the way they are gathered over `tensor` and scattered again, like the stream; but what
    `dots` keeps of the last product is whole there, a sum that nothing scatters, and is not formed again.
    The router's statistics are small: how often each expert was chosen, over all devices at once, and its
    mean probability; both innermost axis first, see `program`.
    """
    model, mesh, remat = layout.model, layout.mesh, layout.experiment.train.remat
    if model.moe is None:
        return
    runs, forward = layout.microbatches * model.num_layers, 1 if remat == "none" else 2
    size = layout.width * layout.slots * model.embed_dim
    yield Exchange("slots", "all-to-all", "expert", mesh["expert"], size, runs * 2 * (forward + 1))
    size *= mesh["tensor"]
    yield Exchange("slots", "all-gather", "tensor", mesh["tensor"], size, runs * (forward + 1))
    if remat == "dots":
        yield Exchange("slots", "all-reduce", "tensor", mesh["tensor"], size, runs)
        forward = 0
    yield Exchange("slots", "reduce-scatter", "tensor", mesh["tensor"], size, runs * (forward + 1))
    counted = 1 if remat == "none" else 2
    for axes, times in ((AXES, counted), (("data", "fsdp", "expert"), 1), (("tensor", "context"), 1)):
        size = 4 * model.moe.num_experts
        for axis in reversed(axes):
            yield Exchange("routing", "all-reduce", axis, mesh[axis], size, runs * times)
            size //= mesh[axis]


def _ring(layout: Layout) -> Iterator[Exchange]:
    """Attention over a sequence divided over `context`: keys and values go round the ring, and round again
    when the layer is formed anew and in the backward pass; there their float32 gradients go with them, and
    home.
    """
    model, n = layout.model, layout.mesh["context"]
    pair = 2 * layout.tokens * model.num_kv_heads // layout.mesh["tensor"] * model.head_dim
    runs = layout.microbatches * model.num_layers
    passes = 2 if layout.experiment.train.remat == "none" else 3
    what, kind = "keys and values", "collective-permute"
    yield Exchange(what, kind, "context", n, layout.width * pair, runs * passes * (n - 1))
    yield Exchange(what, kind, "context", n, 4 * pair, runs * n)
    # Into zigzag order: tokens, positions and documents' starts. Out of it: hidden states; back: their
    # gradient.
    yield Exchange(
        "activations", kind, "context", n, 4 * layout.tokens // (2 if n == 2 else 1), 3 * layout.microbatches
    )
    starts = 4 * layout.rows * layout.experiment.data.sequence_length  # a running maximum over the sequence
    yield Exchange("activations", "all-gather", "context", n, starts, layout.microbatches)
    hidden = layout.width * layout.tokens * model.embed_dim
    if n == 2:  # half of the pieces are at home
        hidden //= 2
    yield Exchange("activations", kind, "context", n, hidden, 2 * layout.microbatches)


def _loss(layout: Layout) -> Iterator[Exchange]:
    """Around the layers, for each microbatch: partial sums of looked-up embeddings are scattered and their
    gradient gathered; the final hidden states are gathered and their gradient scattered, and gathered once
    more in float32 on its way through the final norm. Of the logits, maxima and two sums cross for each
    chunk.
    """
    model, n, runs = layout.model, layout.mesh["tensor"], layout.microbatches
    size = layout.width * layout.tokens * model.embed_dim
    yield Exchange("activations", "all-gather", "tensor", n, size, 2 * runs)
    yield Exchange("activations", "reduce-scatter", "tensor", n, size, 2 * runs)
    yield Exchange("activations", "all-gather", "tensor", n, 4 * layout.tokens * model.embed_dim, runs)
    pieces = math.ceil(layout.length / layout.experiment.train.loss_chunk)
    chunk = layout.rows * math.ceil(layout.length / pieces)
    yield Exchange("loss", "all-reduce", "tensor", n, 4 * chunk, 3 * pieces * runs)
