"""Bytes on one device, by kind, at the three moments of a step that can be its peak.

What is held longest is exact: weights, optimizer and gradients from the parameters' metadata, activations
from what `jax.checkpoint` keeps. What lives for a moment, a layer at work and buffers, is what a schedule
that does nothing twice needs; a compiler may need less or more.

The moments: `loss`, when all activations are kept and the head works; `backward`, when the last layer's
backward pass begins; `update`, when the optimizer works and no activation is left.
"""

from __future__ import annotations

import math

from launch.plan.layout import Layout

KINDS = ("weights", "optimizer", "gradients", "activations", "layer", "logits", "buffers")
MOMENTS = ("loss", "backward", "update")


def peak(layout: Layout) -> tuple[str, dict[str, int]]:
    """The moment that needs most, and the bytes of each kind then: their sum is the peak."""
    moments = {moment: at(moment, layout) for moment in MOMENTS}
    highest = max(moments, key=lambda moment: sum(moments[moment].values()))
    return highest, moments[highest]


def at(moment: str, layout: Layout) -> dict[str, int]:
    """Bytes of each kind at a moment."""
    train, state = layout.experiment.train, layout.parameter_bytes
    sums = state if layout.microbatches > 1 else 0  # over microbatches so far
    copies = 2 if train.average else 1
    held = {"weights": copies * state, "optimizer": layout.optimizer_bytes}
    if layout.experiment.optimizer.offload:  # fetched for the update, a parameter's at a time and the next's
        held["optimizer"] = 0 if moment != "update" else 2 * layout.largest_optimizer_bytes
    if moment == "update":
        return held | {"gradients": state}
    kept = {"activations": layout.model.num_layers * kept_by_layer(layout, train.remat)}
    if moment == "loss":
        return held | kept | {"gradients": sums, "logits": logits(layout)}
    return (
        held | kept | {"gradients": sums + state, "layer": layer_at_work(layout), "buffers": buffers(layout)}
    )


def kept_by_layer(layout: Layout, remat: str) -> int:
    """What a layer keeps for its backward pass.

    `full`: its input alone, which lies divided over `tensor`. `dots`: besides it what each product with a
    weight gave, but for the last, which nothing in the backward pass reads. `none`: what differentiation
    needs and is not at hand otherwise, norms' insides in float32 among it; their outputs are kept as the
    products read them, whole over `tensor`. Experts and router: see below.
    """
    model, width, t = layout.model, layout.width, layout.mesh["tensor"]
    stream, tokens = layout.stream, layout.tokens
    d, f = model.embed_dim, (model.mlp_dim if model.moe is None else model.moe.shared_mlp_dim) // t
    q, kv = model.num_heads // t * model.head_dim, model.num_kv_heads // t * model.head_dim
    gated = model.activation == "swiglu"
    if remat == "full":
        return width * stream * d
    if remat == "dots":
        products = tokens * (q + 2 * kv + (2 if gated else 1) * f)
        out = 0 if model.parallel_residual else stream * d  # where only sums read it, nothing keeps it
        return width * (stream * d + products + out) + of_experts(layout, remat) + _of_router(layout, remat)
    read = 1 if model.moe is None or f else 0  # by an mlp
    norms = 2 * _norm(stream, d) + (1 + read) * width * tokens * d
    if model.qk_norm:
        norms += _norm(tokens * model.num_heads // t, model.head_dim)
        norms += _norm(tokens * model.num_kv_heads // t, model.head_dim)
    attention = (
        width * tokens * (2 * q + 2 * kv) + 4 * tokens * model.num_heads // t
    )  # the softmax's log-sums
    mlp = width * tokens * (3 if gated else 4) * f
    return norms + attention + mlp + of_experts(layout, remat) + _of_router(layout, remat)


def of_experts(layout: Layout, remat: str) -> int:
    """What a layer keeps in its experts' slots: their hidden layers, and what the last product gave, which
    the gradient of the tokens' weights reads; `none` keeps also what the first products read.

    Rows are whole over `tensor` where products read them, and where `dots` keeps what one gave.
    """
    if layout.model.moe is None or remat == "full":
        return 0
    width, n, t = layout.width, layout.slots, layout.mesh["tensor"]
    d, f = layout.model.embed_dim, layout.model.mlp_dim
    if remat == "dots":
        return width * n * (t * d + 2 * f)
    return width * n * (t * d + 3 * f + d)


def _of_router(layout: Layout, remat: str) -> int:
    """What choosing keeps: float32 logits; with `none` also what the router read, its softmax and the
    z-loss's, the choices, their weights and slots.
    """
    model, stream, n = layout.model, layout.stream, layout.mesh
    if model.moe is None:
        return 0
    e, k = model.moe.num_experts, model.moe.top_k
    if remat == "dots":
        return 4 * stream * e
    sums = k + 2 if model.moe.normalize_top_k else 0
    gathered = model.embed_dim * e if n["fsdp"] * n["expert"] > 1 else 0
    each = 4 * (model.embed_dim + 2 * e + 3 * k + 4 + sums) + 1
    return stream * each + 4 * (layout.slots + e + gathered)


def _norm(vectors: int, size: int) -> int:
    """Of a norm: its input and that input normalized, its inverse deviation and a step to it; all float32."""
    return 4 * vectors * (2 * size + 2) + 4 * size


def layer_at_work(layout: Layout) -> int:
    """While a layer's backward pass runs: its activations, formed anew unless they were kept, and gradients.

    Of these the mlp has most alive at once: those of its hidden layer and of both products that led there,
    beside the stream's gradient as it came and as it leaves; experts have them in slots.
    """
    model, t, moe = layout.model, layout.mesh["tensor"], layout.model.moe
    anew = kept_by_layer(layout, "none") if layout.experiment.train.remat != "none" else 0
    hidden = (3 if model.activation == "swiglu" else 2) * model.mlp_dim // t
    if moe is None:
        return anew + layout.width * layout.tokens * (hidden + 2 * model.embed_dim)
    shared = layout.tokens * (3 * moe.shared_mlp_dim // t)
    stream = 2 * layout.stream * model.embed_dim
    return anew + layout.width * (layout.slots * t * (hidden + 2 * model.embed_dim) + shared + stream)


def slots_at_peak(layout: Layout) -> int:
    """Of activations and a layer at work in the backward pass, what lies in experts' slots."""
    model, t, remat = layout.model, layout.mesh["tensor"], layout.experiment.train.remat
    anew = of_experts(layout, "none") if remat != "none" else 0
    gradients = layout.width * layout.slots * (3 * model.mlp_dim + 2 * t * model.embed_dim)
    return model.num_layers * of_experts(layout, remat) + anew + gradients


def logits(layout: Layout) -> int:
    """The head at work on one chunk: float32 logits and softmax, and their gradient; the head gathered, its
    float32 gradient before it is divided; the hidden states, whole over `tensor`, and their gradient.
    """
    model, train = layout.model, layout.experiment.train
    vocab = model.vocab_size // layout.mesh["tensor"]
    pieces = math.ceil(layout.length / train.loss_chunk)
    chunk = layout.rows * math.ceil(layout.length / pieces)
    head = (4 + layout.width) * vocab * model.embed_dim
    return chunk * vocab * (8 + layout.width) + head + 2 * layout.width * layout.tokens * model.embed_dim


def buffers(layout: Layout) -> int:
    """What communication holds beside: two layers' weights gathered in the products' dtype, one at work and
    one on its way, and the largest gradient of a layer, float32, before it is divided.
    """
    gathered = [
        p.share(layout.mesh, gathered=("fsdp",))
        for p in layout.parameters
        if p.stacked and layout.mesh["fsdp"] > 1 and "fsdp" in p.divided
    ]
    return 2 * layout.width * sum(gathered) + 4 * max(gathered, default=0)
