"""Cross entropy over a large vocabulary without ever holding batch x sequence x vocabulary logits.

Gradients are formed in the forward pass, chunk by chunk, where the softmax is at hand; the backward pass
only scales them. So the head costs three products, not the four of recomputation (the idea of fused linear
cross entropy: Hsu et al. 2024, arXiv:2410.10989, and Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core.mesh import num_shards, shard
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

    At most `chunk` positions of each sequence have logits at one time. Only the sum is differentiable: its
    parts, the targets and the weights carry no gradient.
    """
    length = hidden.shape[1]
    pieces = -(-length // chunk)
    chunk = -(-length // pieces)
    if padding := pieces * chunk - length:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0))[: x.ndim])  # noqa: E731
        hidden, targets, weights = pad(hidden), pad(targets), pad(weights)
    return _cross_entropy(z_loss, chunk, hidden, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss, chunk, hidden, kernel, targets, weights):
    kernel = _gathered(kernel, hidden)

    def body(_, piece):
        _, log_z, nll = _chunk_nll(kernel, *piece)
        return None, (log_z, nll)

    _, values = jax.lax.scan(body, None, _chunks(chunk, hidden, targets))
    sums = _sums(*_chunks(chunk, weights), *values)
    return sums.nll + z_loss * sums.z_loss, sums


def _forward(z_loss, chunk, hidden, kernel, targets, weights):
    gathered = _gathered(kernel, hidden)
    # The kernel's gradient is a sum per shard of the batch, and these are added up once, after the loop.
    shards = math.gcd(hidden.shape[0], num_shards("act_batch"))

    def by_shard(x, *axes):
        return shard(x.reshape(shards, -1, *x.shape[1:]), "act_batch", None, *axes)

    def body(d_kernel, piece):
        hidden, targets, weights = piece
        logits, log_z, nll = _chunk_nll(gathered, hidden, targets)
        softmax = jnp.exp(logits - log_z[..., None])
        scale = (weights * (1 + 2 * z_loss * log_z))[..., None]
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (softmax * scale - jnp.where(hit, weights[..., None], 0)).astype(hidden.dtype)
        d_logits = shard(d_logits, "act_batch", "act_seq", "act_vocab")
        d_hidden = product("bsv,vd->bsd", d_logits, gathered)
        # [D, V] within the loop: the CPU copies a product's first operand, and `hidden` is the smaller one.
        d_kernel += jnp.einsum(
            "nbsd,nbsv->ndv",
            by_shard(hidden, "act_seq", "act_embed"),
            by_shard(d_logits, "act_seq", "act_vocab"),
            preferred_element_type=jnp.float32,
        )
        return shard(d_kernel, "act_batch", "act_embed", "act_vocab"), (d_hidden, log_z, nll)

    start = jnp.zeros((shards, *kernel.shape[::-1]), jnp.float32)
    start = shard(start, "act_batch", "act_embed", "act_vocab")
    d_kernel, (d_hidden, *values) = jax.lax.scan(body, start, _chunks(chunk, hidden, targets, weights))
    # Behind a barrier: out of a loop of one chunk XLA would fold the transposition that follows into the
    # product and swap its operands, and for bfloat16 the CPU has no such product.
    d_kernel = jax.lax.optimization_barrier(shard(d_kernel.sum(0), "embed", "vocab").astype(kernel.dtype))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    sums = _sums(*_chunks(chunk, weights), *values)
    return (sums.nll + z_loss * sums.z_loss, sums), (d_hidden, d_kernel)


def _backward(z_loss, chunk, gradients, cotangents):
    d_hidden, d_kernel = gradients
    g = cotangents[0]
    return (d_hidden * g).astype(d_hidden.dtype), (d_kernel * g).T, None, None


_cross_entropy.defvjp(_forward, _backward)


def _gathered(kernel, hidden):
    """The kernel as the products read it, brought together before the loop instead of for each chunk."""
    return shard(kernel.astype(hidden.dtype), "act_vocab", "act_embed")


def _chunk_nll(kernel, hidden, targets):
    logits = product("bsd,vd->bsv", hidden, kernel, jnp.float32)
    logits = shard(logits, "act_batch", "act_seq", "act_vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return logits, log_z, log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _chunks(chunk, *arrays):
    """[B, S, ...] -> [S / chunk, B, chunk, ...]: along the sequence, so that the batch stays sharded."""
    return tuple(
        jnp.moveaxis(a.reshape(a.shape[0], a.shape[1] // chunk, chunk, *a.shape[2:]), 1, 0) for a in arrays
    )


def _sums(weights, log_z, nll) -> LossSums:
    return LossSums(jnp.sum(weights * nll), jnp.sum(weights * log_z**2))
