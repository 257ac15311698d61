"""What crosses the mesh in one step: each exchange of the training step, as XLA's partitioner lays it out.

Letters as in `layout`; b, s are the rows and positions of a microbatch on one device. `tests/launch` holds
every term to what is counted in compiled programs (`launch.plan.program`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

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
    found = [*_weights(layout), *_gradients(layout), *_stream(layout), *_ring(layout), *_loss(layout)]
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
    """
    n, runs = layout.mesh["fsdp"], layout.microbatches
    for p in layout.parameters:
        if "fsdp" not in p.divided:
            continue
        whole = p.share(layout.mesh, gathered=("fsdp",))
        if p.stacked:
            bias = p.path.endswith("bias")  # added in float32, and no product of the backward pass reads it
            times = layout.model.num_layers * runs * (1 if bias else 2)
            yield Exchange("weights", "all-gather", "fsdp", n, (4 if bias else layout.width) * whole, times)
        if p.path == "embedding":
            yield Exchange("weights", "all-gather", "fsdp", n, 4 * whole, runs)
        if p.path == "head" or (p.path == "embedding" and layout.model.tied_head):
            yield Exchange("weights", "all-gather", "fsdp", n, layout.width * whole, runs)


def _gradients(layout: Layout) -> Iterator[Exchange]:
    """Each microbatch's gradients are summed in float32 over all axes that its tokens are divided over: what
    `fsdp` divides is scattered there first, so that the sums over the others are of parts.
    """
    for p in layout.parameters:
        runs = layout.microbatches * (layout.model.num_layers if p.stacked else 1)
        if p.path == "embedding" and layout.model.tied_head:
            runs *= 2  # as a table and as the head
        size, n = 4 * p.share(layout.mesh, gathered=("fsdp",)), layout.mesh
        of_stream = "norm" in p.axes or _added_to_stream(p)  # divided over `tensor` too, as heads are
        table = p.path == "embedding"  # scattered into while the sequence's parts are still apart
        if "fsdp" in p.divided and not (of_stream or table):
            yield Exchange("gradients", "reduce-scatter", "fsdp", n["fsdp"], size, runs)
            size //= n["fsdp"]
        # Some sums follow each other, some are one over several axes, which `program` tells apart like this.
        yield Exchange("gradients", "all-reduce", "context", n["context"], size, runs)
        if of_stream:
            yield Exchange("gradients", "all-reduce", "tensor", n["tensor"], size // n["context"], runs)
        if (of_stream or table) and "fsdp" in p.divided:
            yield Exchange("gradients", "reduce-scatter", "fsdp", n["fsdp"], size, runs)
            size //= n["fsdp"]
        if p.path == "head" or (n["fsdp"] > 1 and not of_stream and not table):
            size //= n["context"]
        for axis in ("expert", "data") if "fsdp" in p.divided else ("expert", "fsdp", "data"):
            yield Exchange("gradients", "all-reduce", axis, n[axis], size, runs)
            size //= n[axis]


def _added_to_stream(p: Parameter) -> bool:
    return p.axes[-1] == "embed" and p.path.endswith("bias")


def _stream(layout: Layout) -> Iterator[Exchange]:
    """The residual stream lies divided over `tensor` along the sequence (Korthikanti et al. 2022): gathered
    before attention and mlp, the partial sums that they end with scattered; backward the other way round.
    With remat the gathered inputs are gathered anew, and `full` forms attention's output again where the mlp
    reads it. (What `none` keeps is gathered already.)
    """
    model, n = layout.model, layout.mesh["tensor"]
    size, runs = layout.width * layout.tokens * model.embed_dim, layout.microbatches * model.num_layers
    remat, parallel = layout.experiment.train.remat, model.parallel_residual
    gathers = 2 + (1 if parallel else 2) + (0 if remat == "none" else 2)  # parallel: one gradient serves both
    scatters = 2 + 2 + (1 if remat == "full" and not parallel else 0)
    yield Exchange("activations", "all-gather", "tensor", n, size, runs * gathers)
    yield Exchange("activations", "reduce-scatter", "tensor", n, size, runs * scatters)


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
