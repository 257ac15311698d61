"""The terms of policy optimization, over arrays of any shape with masks of that shape (None: all count).

Environments and models are unknown here: the same functions serve [T, B] steps and [B, T] tokens.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "*shape"] | None


def masked_mean(x: Float[Array, "*shape"], mask: Mask = None) -> Float[Array, ""]:
    """The mean over what counts; zero where nothing does."""
    if mask is None:
        return x.mean()
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def normalize_advantages(
    advantages: Float[Array, "*shape"], mask: Mask = None, epsilon: float | int = 1e-8
) -> Float[Array, "*shape"]:
    """Mean zero and variance one over what counts; zero elsewhere."""
    mean = masked_mean(advantages, mask)
    variance = masked_mean((advantages - mean) ** 2, mask)
    normal = (advantages - mean) * jax.lax.rsqrt(variance + epsilon)
    return normal if mask is None else jnp.where(mask, normal, 0.0)


def ppo_clip_loss(
    log_probs: Float[Array, "*shape"],
    old_log_probs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    clip: float | int,
    mask: Mask = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped surrogate, to be minimized (Schulman et al. 2017, arXiv:1707.06347, equation 7).

        -mean(min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)),  ratio = exp(log_probs - old_log_probs)

    With it `kl`, how far the policy has come from the old one (k3), and `clip_fraction`, the share of ratios
    outside of the bounds.
    """
    log_ratio = log_probs - old_log_probs
    if mask is not None:  # what doesn't count may hold anything, and exp of it mustn't meet the gradient
        log_ratio = jnp.where(mask, log_ratio, 0.0)
        advantages = jnp.where(mask, advantages, 0.0)
    ratio = jnp.exp(log_ratio)
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    outside = (jnp.abs(ratio - 1) > clip).astype(jnp.float32)
    told = {"kl": masked_mean(ratio - 1 - log_ratio, mask), "clip_fraction": masked_mean(outside, mask)}
    return -masked_mean(surrogate, mask), jax.lax.stop_gradient(told)


def value_loss(
    values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    old_values: Float[Array, "*shape"] | None = None,
    clip: float | int | None = None,
    mask: Mask = None,
) -> Float[Array, ""]:
    """Half the mean squared error to the returns.

    With `clip`, values that have moved from `old_values` by more than that are held there, and the larger of
    both errors counts (the reference implementation of PPO; it often does no good: Andrychowicz et al. 2021,
    arXiv:2006.05990).
    """
    error = (values - returns) ** 2
    if clip is not None:
        assert old_values is not None, "clipping needs the old values"
        held = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, (held - returns) ** 2)
    return 0.5 * masked_mean(error, mask)


def categorical_entropy(logits: Float[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """Entropy (nats) of each distribution; logits may be -inf, for what can't be chosen."""
    log_probs = jax.nn.log_softmax(logits)
    possible = jnp.isfinite(log_probs)
    log_probs = jnp.where(possible, log_probs, 0.0)  # or 0 * -inf, and a gradient that is no number
    return -jnp.where(possible, jnp.exp(log_probs) * log_probs, 0.0).sum(-1)


def gaussian_entropy(log_std: Float[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """Entropy (nats) of each normal distribution with independent components."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl_k1(log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log p/q of what was sampled from p: an estimate of KL(p || q) without bias, of high variance.

    The three estimators are Schulman's (joschu.net/blog/kl-approx.html). As a *loss*, whose gradient passes
    through the estimate and not through the sampling, they are others: the gradient of k1 is zero on average,
    that of k2 is KL(p || q)'s, that of k3 is KL(q || p)'s.

    Args:
        log_probs: log p(x) of x sampled from p.
        reference: log q(x).
    """
    return log_probs - reference


def kl_k2(log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Half the square of `kl_k1`: of low variance, with a bias of higher order. Never negative."""
    return 0.5 * (log_probs - reference) ** 2


def kl_k3(log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """q/p - 1 - log q/p: without bias, of low variance, and never negative."""
    log_ratio = reference - log_probs
    return jnp.expm1(log_ratio) - log_ratio
