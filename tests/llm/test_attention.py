"""Attention against a loop in NumPy and JAX's own; the blockwise form against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llm.model.attention import attention, attention_weights, choose_backend, weighted_values
from llm.model.blockwise import block_size

BACKENDS = ["reference", "blockwise"]


def make(
    seed: int,
    length: int,
    heads: int = 4,
    groups: int = 2,
    keys: int | None = None,
    dtype=jnp.float32,
    size=6,
):
    """q, k, v and sorted segment ids, some of them longer than a block; the last row is one segment."""
    rng = np.random.default_rng(seed)
    keys = keys or length
    q = rng.normal(size=(2, length, heads, size))
    k, v = rng.normal(size=(2, 2, keys, groups, size))
    segments = 1 + np.cumsum(rng.random((2, keys)) < 4 / (keys + 4), axis=1)
    segments[-1] = 1
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(segments, jnp.int32)


def naive(q, k, v, q_segments, kv_segments, window, offset=0):
    """One query at a time, in float64."""
    q_segments, kv_segments = np.asarray(q_segments), np.asarray(kv_segments)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = [
            j
            for j in range(k.shape[1])
            if j <= i + offset
            and kv_segments[b, j] == q_segments[b, i]
            and (window is None or i + offset - j < window)
        ]
        scores = k[b, seen, g] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = (weights / weights.sum()) @ v[b, seen, g]
    return out


@functools.cache
def jitted(window, backend):
    return jax.jit(functools.partial(attention, window=window, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (6, 1)])
def test_equals_a_loop_in_numpy(backend, window, heads, groups):
    q, k, v, segments = make(0, 17, heads, groups)
    ours = jitted(window, backend)(q, k, v, segments, segments)
    assert_allclose(ours, naive(q, k, v, segments, segments, window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_queries_at_an_offset_see_the_cache(window):
    q, k, v, segments = make(1, 3, keys=11)
    segments = segments.at[:, 9:].set(0)  # free slots
    q_segments = segments[:, 6:9]
    ours = jax.jit(functools.partial(attention, window=window))(q, k, v, q_segments, segments, q_offset=6)
    assert_allclose(ours, naive(q, k, v, q_segments, segments, window, offset=6), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5])
def test_equals_jaxs_own(backend, window):
    q, k, v, segments = make(2, 24)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    theirs = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
    )
    assert_allclose(jitted(window, backend)(q, k, v, segments, segments), theirs, atol=2e-6)


@functools.cache
def with_gradients(window, backend):
    """Output and gradients of a fixed random projection of it, one program."""

    def run(q, k, v, segments, kv_segments):
        def score(q, k, v):
            out = attention(q, k, v, segments, kv_segments, window=window, backend=backend)
            weights = jax.random.normal(jax.random.key(0), out.shape)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.grad(score, (0, 1, 2), has_aux=True)(q, k, v)

    return jax.jit(run)


# Lengths below, at, just past and far from a multiple of the block; windows inside and across blocks.
GRID = [
    (1, 1000, 4, 2),
    (128, 128, 4, 1),
    (129, None, 4, 2),
    (257, 129, 4, 2),
    (300, 50, 6, 3),
    (391, 1, 2, 2),
]


@pytest.mark.parametrize(("length", "window", "heads", "groups"), GRID)
def test_blockwise_equals_the_reference(length, window, heads, groups):
    q, k, v, segments = make(3, length, heads, groups)
    expected, out = with_gradients(window, "reference")(q, k, v, segments, segments)
    got, ours = with_gradients(window, "blockwise")(q, k, v, segments, segments)
    assert_allclose(ours, out, atol=3e-6)
    for name, mine, theirs in zip("qkv", got, expected, strict=True):
        # With a window of one key the gradients of q and k are zero but for rounding.
        assert_allclose(mine, theirs, atol=1e-5 * max(np.abs(theirs).max(), 0.1), err_msg=name)


def test_long_rows_have_larger_blocks():
    """Past the greatest number of blocks the blocks grow, and the numbers stay."""
    length = 2100
    assert block_size(length) > block_size(300)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 4)), jnp.float32) for _ in range(3))
    segments = jnp.asarray(1 + np.arange(length)[None] // 900, jnp.int32)
    ours, theirs = (
        jitted(700, backend)(q, k, v, segments, segments) for backend in ("blockwise", "reference")
    )
    assert_allclose(ours, theirs, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_have_segments_of_their_own(backend):
    """Queries of one segment may look at keys marked otherwise than their own index is."""
    q, k, v, _ = make(4, 12)
    q_segments = jnp.full((2, 12), 7).at[0, 8:].set(9)
    kv_segments = jnp.full((2, 12), 7).at[0, 2:5].set(9)
    ours = jitted(None, backend)(q, k, v, q_segments, kv_segments)
    assert_allclose(ours, naive(q, k, v, q_segments, kv_segments, None), atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=20, max_size=20),
    st.sampled_from(BACKENDS),
    st.sampled_from([None, 4]),
)
def test_any_segments(segments, backend, window):
    """Also ids that come back after others, and padding (0), which sees itself."""
    q, k, v, _ = make(5, 20)
    segments = jnp.asarray([segments, segments[::-1]], jnp.int32)
    ours = jitted(window, backend)(q, k, v, segments, segments)
    assert_allclose(ours, naive(q, k, v, segments, segments, window), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 6])
def test_editing_a_document_leaves_its_neighbour_alone(backend, window):
    """Bitwise, though the edit is as large as float32 allows without overflow of the scores."""
    q, k, v, _ = make(6, 20)
    segments = jnp.asarray([[1] * 8 + [2] * 12, [5] * 8 + [0] * 12], jnp.int32)
    edited = [x.at[:, :8].multiply(1e6) for x in (q, k, v)]
    run = with_gradients(window, backend)
    (dq, dk, dv), out = run(q, k, v, segments, segments)
    (dq2, dk2, dv2), out2 = run(*edited, segments, segments)
    for before, after in [(out, out2), (dq, dq2), (dk, dk2), (dv, dv2)]:
        np.testing.assert_array_equal(before[:, 8:], after[:, 8:])
    assert np.all(np.abs(out[:, :8] - out2[:, :8]).max(-1) > 1)


# XLA's CPU backend has other products for real sizes than for tiny ones.
@pytest.mark.parametrize(("length", "size"), [(40, 6), (256, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32(backend, length, size):
    q, k, v, segments = make(7, length, size=size)
    expected, out = with_gradients(None, "reference")(q, k, v, segments, segments)
    halves = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got, ours = with_gradients(None, backend)(*halves, segments, segments)
    assert ours.dtype == jnp.bfloat16
    assert_allclose(ours.astype(jnp.float32), out, atol=0.03 * np.abs(out).max())
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert_allclose(mine.astype(jnp.float32), theirs, atol=0.03 * np.abs(theirs).max())


def test_maps_are_what_the_reference_computes():
    q, k, v, segments = make(8, 15)
    weights = attention_weights(q, k, segments, segments, 4)
    assert weights.shape == (2, 2, 2, 15, 15)
    assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert np.all(np.asarray(weights)[..., ~np.tri(15, dtype=bool)] == 0)
    np.testing.assert_array_equal(
        weighted_values(weights, v), attention(q, k, v, segments, segments, window=4, backend="reference")
    )


def test_a_mask_that_blockwise_cannot_honour_is_an_error():
    q, k, v, segments = make(9, 5, keys=8)
    with pytest.raises(ValueError, match="use 'reference'"):
        attention(q, k, v, segments[:, :5], segments, backend="blockwise")
    q, k, v, segments = make(9, 5)
    for offset in (3, jnp.int32(0)):
        with pytest.raises(ValueError, match="use 'reference'"):
            attention(q, k, v, segments, segments, q_offset=offset, backend="blockwise")


def test_choice_of_a_backend():
    assert choose_backend("auto", "cpu") == "blockwise"
    assert choose_backend("auto", "gpu") == "reference"
    assert choose_backend("reference", "cpu") == "reference"
