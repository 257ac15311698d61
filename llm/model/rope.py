"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), plain and rescaled for long contexts.

The rotated halves are the first and second half of the rotary dimensions, as in Hugging Face's weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies [rotary_dim / 2] in radians per position, and the factor on cos and sin."""
    dim = config.rotary_dim
    plain = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, config.rope_theta), 0.1 * math.log(scaling.factor) + 1.0


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1)."""
    turns = scaling.original_length * plain / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Interpolate the dimensions that turn less than `beta_slow` times, keep those past `beta_fast`."""
    dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    interpolate = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - interpolate) + plain / scaling.factor * interpolate


def rotations(config: ModelConfig, positions: Int[Array, "B S"]) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, float32 [B, S, rotary_dim / 2]."""
    frequency, factor = frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    # In a loop, out of which XLA's CPU backend can't fuse them into every layer, there to compute them again.
    waves = lambda sine: factor * jnp.where(sine, jnp.sin(angles), jnp.cos(angles))  # noqa: E731
    cos, sin = jax.lax.map(waves, jnp.array([False, True]))
    return cos, sin


@jax.custom_vjp
def rotate(
    x: Float[Array, "B S H K"], cos: Float[Array, "B S R"], sin: Float[Array, "B S R"]
) -> Float[Array, "B S H K"]:
    """Rotate the first 2R of the K dimensions of each head; the others pass."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


# A rotation's derivative is the rotation back.
rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda residuals, g: (rotate(g, residuals[0], -residuals[1]), None, None),
)
