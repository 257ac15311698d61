"""The terms of policy optimization, over arrays of any shape with masks of that shape (None: all count).

Environments and models are unknown here: the same functions serve [T, B] steps and [B, T] tokens. What a mask
leaves out may hold anything, infinities and NaN too: it is cut off before anything is computed of it, so that
gradients there are zero. (A product with zero would leave NaN.)

A loss is a sum over what counts, divided by `total`, by default by how many count. Microbatches, or devices,
whose losses are to add up to the whole's give the whole's count; under `jax.vmap` each row has its own mean.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

Mask = Bool[Array, "*shape"] | None
Total = Num[Array, ""] | float | int | None


def where_counted(x: Float[Array, "*shape"], mask: jax.Array | None) -> Float[Array, "*shape"]:
    """What counts; zero elsewhere.

    Raises:
        TypeError: if the mask is of numbers, which look like weights.
    """
    if mask is None:
        return x
    if mask.dtype != bool:
        raise TypeError(
            f"a mask says what counts and is boolean, this one is {mask.dtype}: compare it with 0"
        )
    return jnp.where(mask, x, 0.0)


def masked_mean(x: Float[Array, "*shape"], mask: Mask = None, total: Total = None) -> Float[Array, ""]:
    """The sum over what counts divided by `total`, or by how many count; zero where nothing does."""
    if total is None:
        total = x.size if mask is None else jnp.maximum(mask.sum(), 1)
    return where_counted(x, mask).sum() / total


def normalize_advantages(
    advantages: Float[Array, "*shape"], mask: Mask = None, epsilon: float | int = 1e-8
) -> Float[Array, "*shape"]:
    """Mean zero and variance one over what counts; zero elsewhere, and where all that counts is equal.

    `jax.vmap` over groups normalizes each by itself.
    """
    # From one of them, so that equal ones are exactly 0: rounding of their mean would be blown up.
    first = advantages.ravel()[0 if mask is None else mask.ravel().argmax()]
    away = where_counted(advantages - first, mask)
    mean = masked_mean(away, mask)
    variance = masked_mean((away - mean) ** 2, mask)
    return where_counted((away - mean) * jax.lax.rsqrt(variance + epsilon), mask)


def ppo_clip_loss(
    log_probs: Float[Array, "*shape"],
    old_log_probs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    clip: float | int,
    mask: Mask = None,
    total: Total = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped surrogate, to be minimized (Schulman et al. 2017, arXiv:1707.06347, equation 7).

        -mean(min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)),  ratio = exp(log_probs - old_log_probs)

    With it `kl`, how far the policy has come from the old one (k3), and `clip_fraction`, the share of ratios
    outside of the bounds.
    """
    log_ratio = where_counted(log_probs - old_log_probs, mask)
    advantages = where_counted(advantages, mask)
    ratio = jnp.exp(log_ratio)
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    outside = (jnp.abs(ratio - 1) > clip).astype(jnp.float32)
    told = {"kl": ratio - 1 - log_ratio, "clip_fraction": outside}
    told = {name: masked_mean(figure, mask, total) for name, figure in told.items()}
    return -masked_mean(surrogate, mask, total), jax.lax.stop_gradient(told)


def value_loss(
    values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    old_values: Float[Array, "*shape"] | None = None,
    clip: float | int | None = None,
    mask: Mask = None,
    total: Total = None,
) -> Float[Array, ""]:
    """Half the mean squared error to the returns.

    With `clip`, values that have moved from `old_values` by more than that are held there, and the larger of
    both errors counts (the reference implementation of PPO; it often does no good: Andrychowicz et al. 2021,
    arXiv:2006.05990).
    """
    values, returns = where_counted(values, mask), where_counted(returns, mask)
    error = (values - returns) ** 2
    if clip is not None:
        assert old_values is not None, "clipping needs the old values"
        old_values = where_counted(old_values, mask)
        held = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, (held - returns) ** 2)
    return 0.5 * masked_mean(error, mask, total)


def categorical_entropy(logits: Float[Array, "*shape n"], mask: Mask = None) -> Float[Array, "*shape"]:
    """Entropy (nats) of each distribution that counts, zero elsewhere.

    Logits may be -inf, for what can't be chosen.
    """
    logits = (
        logits if mask is None else where_counted(logits, jnp.broadcast_to(mask[..., None], logits.shape))
    )
    log_probs = jax.nn.log_softmax(logits)
    possible = jnp.isfinite(log_probs)
    log_probs = jnp.where(possible, log_probs, 0.0)  # or 0 * -inf, and a gradient that is no number
    return where_counted(-jnp.where(possible, jnp.exp(log_probs) * log_probs, 0.0).sum(-1), mask)


def gaussian_entropy(log_std: Float[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """Entropy (nats) of each normal distribution with independent components."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl_k1(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"], mask: Mask = None
) -> Float[Array, "*shape"]:
    """log p/q of what was sampled from p: an estimate of KL(p || q) without bias, of high variance.

    The three estimators are Schulman's (joschu.net/blog/kl-approx.html). As a *loss*, whose gradient passes
    through the estimate and not through the sampling, they are others: the gradient of k1 is zero on average,
    that of k2 is KL(p || q)'s, that of k3 is KL(q || p)'s.

    Args:
        log_probs: log p(x) of x sampled from p.
        reference: log q(x).
        mask: which x there are; the estimate of the others is zero.
    """
    return where_counted(log_probs - reference, mask)


def kl_k2(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"], mask: Mask = None
) -> Float[Array, "*shape"]:
    """Half the square of `kl_k1`: of low variance, with a bias of higher order. Never negative."""
    return 0.5 * kl_k1(log_probs, reference, mask) ** 2


def kl_k3(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"], mask: Mask = None
) -> Float[Array, "*shape"]:
    """q/p - 1 - log q/p: without bias, of low variance, and never negative."""
    log_ratio = -kl_k1(log_probs, reference, mask)
    return jnp.expm1(log_ratio) - log_ratio
