"""Drawing the next token from logits: temperature, top-k, top-p, and the log-probability of what was drawn.

Nothing is sorted: XLA sorts [16, 8192] on two CPU cores in 23 ms, many times what the rest of a decoding
step takes. A filter looks for its threshold by bisection instead, and one uniform number per row picks the
token where the cumulative probability passes it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from core.errors import UserError


class Sampling(NamedTuple):
    """What is drawn from; fields that are None switch their step off, and compile to nothing.

    `temperature` None is greedy: the likeliest token. The `top_k` likeliest tokens are kept after scaling by
    1 / temperature, then of their renormalized distribution the likeliest tokens that together reach `top_p`
    (Holtzman et al. 2020, arXiv:1904.09751). Tokens as likely as the last one kept are kept too.
    """

    temperature: float | jax.Array | None = None
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None

    @classmethod
    def of(cls, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> Sampling:
        """Check what a user asked for; temperature 0 means greedy, whatever the filters.

        Raises:
            UserError: for a temperature below 0, a top-k below 1, a top-p outside (0, 1].
        """
        if not 0 <= temperature < math.inf:
            raise UserError(
                f"the temperature is {temperature}: it must be 0 (always the likeliest token) or more, "
                "1 to sample as the model predicts"
            )
        if top_k is not None and top_k < 1:
            raise UserError(f"top-k is {top_k}: it must be at least 1, or left out to keep all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top-p is {top_p}: it must be above 0 and at most 1")
        if temperature == 0:
            return cls()
        return cls(temperature, top_k, None if top_p == 1 else top_p)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw a token per row, each with its own key; a row's result does not depend on the other rows.

    Returns the tokens and their log-probabilities under softmax(logits), the model's own distribution,
    before temperature and filters.
    """
    if sampling.temperature is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = _draw(probabilities(logits, sampling), keys)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


class RowSampling(NamedTuple):
    """How a token is drawn, for each row by itself: a `Sampling` with values for what is switched off."""

    temperature: Float[Array | np.ndarray, " B"]  # 0: greedy
    top_k: Int[Array | np.ndarray, " B"]  # 0: all tokens
    top_p: Float[Array | np.ndarray, " B"]  # 1: all tokens


def sample_rows(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], rows: RowSampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """`sample`, each row in its own way; what no row asks for takes no time.

    A row gets the token that `sample` gives it for its `Sampling`.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def keep(values, weights, targets, off):
        every = lambda: jnp.ones_like(values, bool)  # noqa: E731
        some = lambda: _largest(values, weights, targets) | off[:, None]  # noqa: E731
        return jax.lax.cond(jnp.all(off), every, some)

    def draw():
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)
        scores = logits / temperature[:, None]
        keep_k = keep(scores, jnp.ones_like(scores), rows.top_k, (rows.top_k == 0) | (rows.temperature == 0))
        p = jax.nn.softmax(jnp.where(keep_k, scores, -jnp.inf), axis=-1)
        off = (rows.top_p == 1) | (rows.temperature == 0)
        kept = jnp.where(keep(p, p, rows.top_p, off), p, 0)
        p = jnp.where(off[:, None], p, kept / kept.sum(-1, keepdims=True))
        return jnp.where(rows.temperature > 0, _draw(p, keys), greedy)

    tokens = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def probabilities(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The distribution that is drawn from: tempered, filtered, zero outside the filters."""
    scores = logits / jnp.asarray(sampling.temperature)
    if sampling.top_k is not None:
        scores = jnp.where(_largest(scores, jnp.ones_like(scores), sampling.top_k), scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1)
    if sampling.top_p is not None:
        p = jnp.where(_largest(p, p, sampling.top_p), p, 0)
        p = p / p.sum(-1, keepdims=True)
    return p


def _largest(values: Float[Array, "B V"], weights: Float[Array, "B V"], target) -> Bool[Array, "B V"]:
    """The largest values of each row that together weigh at least `target`; equal values go together.

    Floats, their bits read as integers (the negative ones mirrored), are in the same order: so bisection
    over the bits finds the exact threshold in 32 passes over the row.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))

    def settle_bit(i, threshold):
        higher = threshold + (jnp.int32(1) << (31 - i))  # for i = 0 it wraps around, from the lowest to 0
        weight = jnp.sum(jnp.where(order >= higher[:, None], weights, 0), axis=-1)
        return jnp.where(weight >= target, higher, threshold)

    lowest = jnp.full(values.shape[:1], jnp.iinfo(jnp.int32).min)
    return order >= jax.lax.fori_loop(0, 32, settle_bit, lowest)[:, None]


def _draw(p: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """The first token at which the cumulative probability passes a uniform number.

    Only tokens of non-zero probability can be drawn, however the sums are rounded.
    """
    reached = jnp.where(p > 0, jnp.cumsum(p, axis=-1), 0)
    uniform = jax.vmap(jax.random.uniform)(keys)  # in [0, 1), so below the largest sum when multiplied by it
    return jnp.argmax(reached > (uniform * reached.max(-1))[:, None], axis=-1)


def fold_in(keys: Key[Array, " B"], data: Integer[Array, " B"]) -> Key[Array, " B"]:
    """A key for each row from its own key and number."""
    return jax.vmap(jax.random.fold_in)(keys, data)


def prompt_keys(key: Key[Array, ""], prompts: Sequence[list[int]]) -> Key[Array, " B"]:
    """A key for each prompt, from its ids and how often they came before: the other prompts don't matter."""
    numbers = [zlib.crc32(np.asarray(prompt, np.int64).tobytes()) for prompt in prompts]
    repeats = [list(prompts[:i]).count(prompt) for i, prompt in enumerate(prompts)]
    keys = fold_in(jnp.broadcast_to(key, len(prompts)), jnp.asarray(numbers, jnp.uint32))
    return fold_in(keys, jnp.asarray(repeats, jnp.uint32))
