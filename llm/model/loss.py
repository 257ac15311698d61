"""Cross entropy over a large vocabulary without ever holding batch x sequence x vocabulary logits.

Gradients are formed in the forward pass, chunk by chunk, where the softmax is at hand; the backward pass
only scales them. So the head costs three products, not the four of recomputation (the idea of fused linear
cross entropy: Hsu et al. 2024, arXiv:2410.10989, and Wijmans et al. 2024, arXiv:2411.09009).

On a mesh each device has the tokens of its place and, along `tensor`, a part of the vocabulary, as in
Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): of the logits only maxima and sums cross the mesh, and
the gradients are added up once, after the last chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from core.mesh import AXES, mesh_axes, shard, spec
from llm.model.layers import product


class LossSums(NamedTuple):
    """Weighted sums over tokens, in nats; dividing is the caller's."""

    nll: Float[Array, ""]
    z_loss: Float[Array, ""]  # sum of log(Z)^2 (PaLM, arXiv:2204.02311)


def cross_entropy(
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    *,
    z_loss: float = 0.0,
    chunk: int = 512,
) -> tuple[Float[Array, ""], LossSums]:
    """`sum(weights * (nll + z_loss * log(Z)^2))`, differentiable in `hidden` and `kernel`, and its parts.

    At most `chunk` positions of what a device has of each sequence have logits at one time. Only the sum is
    differentiable: its parts, the targets and the weights carry no gradient. On a mesh, B, S and V must
    divide over it.
    """
    return _cross_entropy(z_loss, chunk, hidden, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss, chunk, hidden, kernel, targets, weights):
    return _on_each_device(_sums, (), z_loss, chunk, hidden, kernel, targets, weights)


def _forward(z_loss, chunk, hidden, kernel, targets, weights):
    split = (("act_batch", "act_stream", "act_embed"), ("embed", "vocab"))
    (total, sums), d_hidden, d_kernel = _on_each_device(
        _sums_and_gradients, split, z_loss, chunk, hidden, kernel, targets, weights
    )
    return (total, sums), (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(z_loss, chunk, gradients, cotangents):
    d_hidden, d_kernel = gradients
    g = cotangents[0]
    return (d_hidden * g).astype(d_hidden.dtype), (d_kernel * g).T, None, None


_cross_entropy.defvjp(_forward, _backward)


class Axes(NamedTuple):
    """Mesh axes that a device's part of the loss is summed over; empty without a mesh."""

    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of the kernel, which is gathered, and its gradient divided again
    tokens: tuple[str, ...] = ()


def _on_each_device(function, gradients, z_loss, chunk, hidden, kernel, targets, weights):
    """`function` of what each device has, as arrays of the whole mesh; `gradients` are its other results."""
    # Cast before it is gathered, and behind a constraint: XLA would else gather what it is cast from.
    kernel = shard(kernel.astype(hidden.dtype), "vocab", "embed")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(Axes(), z_loss, chunk, hidden, kernel, targets, weights)
    divided = tuple(axis for axis in AXES if mesh.shape[axis] > 1)
    of = lambda name: tuple(a for a in divided if a in mesh_axes(name))  # noqa: E731
    axes = Axes(of("vocab"), of("embed"), of("act_batch") + of("act_seq"))
    rows = spec(("act_batch", "act_seq"))
    sums = PartitionSpec()
    return jax.shard_map(
        functools.partial(function, axes, z_loss, chunk),
        in_specs=(spec(("act_batch", "act_seq", "act_embed")), spec(("act_vocab", "act_embed")), rows, rows),
        out_specs=(sums, *map(spec, gradients)) if gradients else sums,
        check_vma=False,  # not differentiated: the gradients are results
    )(hidden, kernel, targets, weights)


def _sums(axes, z_loss, chunk, hidden, kernel, targets, weights):
    def body(_, piece):
        _, _, log_z, nll = _chunk_nll(axes, kernel, *piece)
        return None, (log_z, nll)

    pieces = _chunks(chunk, hidden, targets, weights)
    _, values = jax.lax.scan(body, None, pieces[:2])
    return _weighted(axes, z_loss, pieces[2], *values)


def _sums_and_gradients(axes, z_loss, chunk, hidden, kernel, targets, weights):
    def body(d_kernel, piece):
        hidden, targets, weights = piece
        logits, hit, log_z, nll = _chunk_nll(axes, kernel, hidden, targets)
        softmax = jnp.exp(logits - log_z[..., None])
        scale = (weights * (1 + 2 * z_loss * log_z))[..., None]
        d_logits = (softmax * scale - jnp.where(hit, weights[..., None], 0)).astype(hidden.dtype)
        d_hidden = product("bsv,vd->bsd", d_logits, kernel)
        # [D, V] within the loop: the CPU copies a product's first operand, and `hidden` is the smaller one.
        d_kernel += jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_kernel, (d_hidden, log_z, nll)

    pieces = _chunks(chunk, hidden, targets, weights)
    d_kernel, (d_hidden, *values) = jax.lax.scan(body, jnp.zeros(kernel.shape[::-1], jnp.float32), pieces)
    # Behind a barrier: out of a loop of one chunk XLA would fold the transposition that follows into the
    # product and swap its operands, and for bfloat16 the CPU has no such product.
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    d_hidden = _sum_and_divide(d_hidden[:, : hidden.shape[1]], axes.vocab, 1, ())
    d_kernel = _sum_and_divide(d_kernel, axes.embed, 0, axes.tokens)
    return _weighted(axes, z_loss, pieces[2], *values), d_hidden, d_kernel


def _chunk_nll(axes: Axes, kernel, hidden, targets):
    """Of a device's part [v, D] of the vocabulary: logits, where the target is, log Z and -log p(target)."""
    logits = product("bsd,vd->bsv", hidden, kernel, jnp.float32)
    top = jax.lax.pmax(logits.max(-1), axes.vocab)
    log_z = top + jnp.log(jax.lax.psum(jnp.exp(logits - top[..., None]).sum(-1), axes.vocab))
    first = jax.lax.axis_index(axes.vocab) * len(kernel) if axes.vocab else 0
    hit = (targets - first)[..., None] == jnp.arange(len(kernel))
    return logits, hit, log_z, log_z - jax.lax.psum(jnp.where(hit, logits, 0).sum(-1), axes.vocab)


def _sum_and_divide(x, axes: tuple[str, ...], dimension: int, more: tuple[str, ...]):
    """The sum of x over `axes`, of which each device takes its part of `dimension`, and over `more`."""
    x = jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x
    return jax.lax.psum(x, tuple(axis for axis in more if axis not in axes))


def _chunks(chunk, *arrays):
    """[B, S, ...] -> [ceil(S / chunk), B, chunk, ...], padded with zeros."""
    length = arrays[0].shape[1]
    pieces = -(-length // chunk)
    chunk = -(-length // pieces)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - length), (0, 0))[: x.ndim])
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    return tuple(map(cut, arrays))


def _weighted(axes: Axes, z_loss, weights, log_z, nll):
    """The objective and its parts, over the tokens of all devices."""
    sums = LossSums(jnp.sum(weights * nll), jnp.sum(weights * log_z**2))
    sums = LossSums(*jax.lax.psum(tuple(sums), axes.tokens))
    return sums.nll + z_loss * sums.z_loss, sums
