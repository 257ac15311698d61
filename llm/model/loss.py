"""Cross entropy over a large vocabulary without ever holding batch x sequence x vocabulary logits.

Gradients are formed in the forward pass, chunk by chunk, where the softmax is at hand; the backward pass
only scales them. So the head costs three products, not the four of recomputation (the idea of fused linear
cross entropy: Hsu et al. 2024, arXiv:2410.10989, and Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core.mesh import shard
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
    def body(sums, piece):
        _, log_z, nll = _chunk_nll(kernel, *piece[:2])
        return _add(sums, nll, log_z, piece[2]), None

    sums, _ = jax.lax.scan(body, _zeros(), _chunks(chunk, hidden, targets, weights))
    return sums.nll + z_loss * sums.z_loss, sums


def _forward(z_loss, chunk, hidden, kernel, targets, weights):
    def body(carry, piece):
        sums, d_kernel = carry
        hidden, targets, weights = piece
        logits, log_z, nll = _chunk_nll(kernel, hidden, targets)
        softmax = jnp.exp(logits - log_z[..., None])
        scale = (weights * (1 + 2 * z_loss * log_z))[..., None]
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (softmax * scale - jnp.where(hit, weights[..., None], 0)).astype(hidden.dtype)
        d_logits = shard(d_logits, "act_batch", "act_seq", "act_vocab")
        d_hidden = product("bsv,vd->bsd", d_logits, kernel)
        # [D, V] within the loop: the CPU copies a product's first operand, and `hidden` is the smaller one.
        d_kernel += jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (_add(sums, nll, log_z, weights), d_kernel), d_hidden

    start = (_zeros(), jnp.zeros(kernel.shape[::-1], jnp.float32))
    (sums, d_kernel), d_hidden = jax.lax.scan(body, start, _chunks(chunk, hidden, targets, weights))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return (sums.nll + z_loss * sums.z_loss, sums), (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(z_loss, chunk, gradients, cotangents):
    d_hidden, d_kernel = gradients
    g = cotangents[0]
    return (d_hidden * g).astype(d_hidden.dtype), (d_kernel * g).T, None, None


_cross_entropy.defvjp(_forward, _backward)


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


def _zeros() -> LossSums:
    return LossSums(jnp.float32(0), jnp.float32(0))


def _add(sums: LossSums, nll, log_z, weights) -> LossSums:
    return LossSums(sums.nll + jnp.sum(weights * nll), sums.z_loss + jnp.sum(weights * log_z**2))
