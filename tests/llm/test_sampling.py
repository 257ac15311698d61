"""Sampling against a NumPy reference of the filtered distribution, and against counts of what is drawn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from core.errors import UserError
from llm.sampling import RowSampling, Sampling, probabilities, prompt_keys, sample, sample_rows

VOCAB = 37
LOGITS = np.random.default_rng(0).normal(0, 2, (5, VOCAB)).astype(np.float32)
SETTINGS = [
    (1.0, None, None),
    (0.7, None, None),
    (1.3, 5, None),
    (1.0, None, 0.8),
    (0.9, 12, 0.6),
    (1.0, 1, None),
    (1.0, None, 1e-6),
    (1.0, 1000, 0.999999),
]


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row's distribution in float64, by sorting."""
    scores = logits.astype(np.float64) / temperature
    order = np.argsort(-scores)
    kept = order[:top_k]
    p = np.exp(scores[kept] - scores.max())
    p /= p.sum()
    if top_p is not None:
        count = np.searchsorted(np.cumsum(p), top_p) + 1  # the first that together reach top_p
        kept, p = kept[:count], p[:count] / p[:count].sum()
    full = np.zeros(len(logits))
    full[kept] = p
    return full


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_distribution_is_the_references(temperature, top_k, top_p):
    ours = jax.jit(probabilities)(LOGITS, Sampling.of(temperature, top_k, top_p))
    theirs = np.stack([reference(row, temperature, top_k, top_p) for row in LOGITS])
    assert_array_equal(np.asarray(ours) > 0, theirs > 0)
    assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


def test_equal_tokens_are_kept_together():
    logits = jnp.asarray([[2.0, 1.0, 1.0, -1.0]])
    by_k = probabilities(logits, Sampling.of(1.0, top_k=2)) > 0
    assert_array_equal(by_k[0], [True, True, True, False])
    by_p = probabilities(logits, Sampling.of(1.0, top_p=0.6)) > 0
    assert_array_equal(by_p[0], [True, True, True, False])


@functools.cache
def draws(count: int):
    keys = jax.random.split(jax.random.key(1), count)
    draw = jax.jit(lambda row, sampling: sample(jnp.broadcast_to(row, (count, VOCAB)), keys, sampling))
    return lambda *settings: draw(LOGITS[0], Sampling.of(*settings))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (1.3, 12, 0.9)])
def test_frequencies_are_the_distributions(temperature, top_k, top_p):
    count = 20_000
    tokens, _ = draws(count)(temperature, top_k, top_p)
    expected = count * reference(LOGITS[0], temperature, top_k, top_p)
    seen = np.bincount(tokens, minlength=VOCAB)
    assert not seen[expected == 0].any()
    expected, seen = expected[expected > 5], seen[expected > 5]  # where chi-square holds
    statistic, freedom = np.sum((seen - expected) ** 2 / expected), len(expected) - 1
    assert statistic < freedom + 3.1 * np.sqrt(2 * freedom)  # exceeded by chance in about one of 500


def test_log_probabilities_are_the_models_own():
    tokens, log_probabilities = draws(64)(1.3, 12, 0.9)
    own = LOGITS[0] - np.log(np.exp(LOGITS[0].astype(np.float64)).sum())
    assert len(set(tokens.tolist())) > 3
    assert_allclose(log_probabilities, own[tokens], rtol=1e-5)


def test_temperature_0_is_the_likeliest_token():
    keys = jax.random.split(jax.random.key(0), 5)
    tokens, _ = sample(jnp.asarray(LOGITS), keys, Sampling.of(0.0, top_k=3, top_p=0.5))
    assert_array_equal(tokens, LOGITS.argmax(-1))


def test_never_a_token_without_probability():
    """Where rounding of the cumulative sum could give one away: long rows, almost everything filtered."""
    logits = np.random.default_rng(1).normal(0, 4, (64, 5000)).astype(np.float32)
    sampling = Sampling.of(1.0, top_p=0.5)
    keys = jax.random.split(jax.random.key(2), len(logits))
    tokens, _ = jax.jit(sample)(logits, keys, sampling)
    p = np.asarray(jax.jit(probabilities)(logits, sampling))
    assert (np.take_along_axis(p, np.asarray(tokens)[:, None], 1) > 0).all()


def test_keys_of_prompts():
    def bits(prompts):
        return [
            tuple(row) for row in np.asarray(jax.random.key_data(prompt_keys(jax.random.key(0), prompts)))
        ]

    a, b, again = bits([[1, 2], [3], [1, 2]])
    assert len({a, b, again}) == 3  # equal prompts are continued each in its own way
    assert bits([[3], [1, 2]]) == [b, a]  # whatever stands beside them
    assert bits([[1, 2], [1, 2]]) == [a, again]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((-0.5,), "temperature is -0.5"),
        ((float("nan"),), "temperature is nan"),
        ((1.0, 0), "top-k is 0"),
        ((1.0, None, 0.0), "top-p is 0"),
        ((1.0, None, 1.5), "top-p is 1.5"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        Sampling.of(*settings)


@pytest.mark.parametrize("settings", [[], SETTINGS[:2], SETTINGS], ids=["greedy", "unfiltered", "all"])
def test_each_row_its_own_way(settings):
    """Every row draws what it draws where all are sampled alike, whatever stands beside it."""
    settings = [(0.0, None, None), *settings]
    count = len(settings)
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (count, VOCAB)), jnp.float32)
    columns = (np.array([s[i] or off for s in settings]) for i, off in enumerate((0.0, 0, 1.0)))
    kinds = (np.float32, np.int32, np.float32)
    rows = RowSampling(*(jnp.asarray(c, kind) for c, kind in zip(columns, kinds, strict=True)))
    draw, draw_alone = jax.jit(sample_rows), jax.jit(sample)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), count)
        tokens, log_p = draw(logits, keys, rows)
        for i, setting in enumerate(settings):
            token, p = draw_alone(logits[i : i + 1], keys[i : i + 1], Sampling.of(*setting))
            assert tokens[i] == token[0]
            assert_allclose(log_p[i], p[0], rtol=1e-5)
