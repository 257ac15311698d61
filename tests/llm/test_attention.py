"""Attention against a loop in NumPy and JAX's own; every backend against the reference; what it computes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose
from programs import collectives, products

from core.errors import UserError
from core.mesh import make_mesh
from core.options import MeshConfig
from llm.model import fused
from llm.model.attention import attention, attention_weights, choose_backend, weighted_values
from llm.model.blockwise import block_size
from llm.model.config import ModelConfig, Sparsity
from llm.model.fused import cudnn_attention, pallas_attention
from llm.model.masks import CAUSAL, Mask, document_starts

SPARSE = Mask(sparsity=Sparsity(3, 2, 1))
MASKS = [CAUSAL, Mask(window=1), Mask(window=4), SPARSE, Mask(sparsity=Sparsity(2, 1, 2))]
# What each backend takes, with documents apart; on the CPU Pallas is interpreted.
TAKES = [(b, mask) for b in ("reference", "blockwise") for mask in MASKS] + [("pallas", CAUSAL)]
BACKENDS = ["reference", "blockwise", "pallas"]


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


def sees(segments, mask: Mask, i: int, j: int) -> bool:
    """The definition in words, on places in the document."""
    if j > i or len(set(segments[j : i + 1])) > 1:
        return False
    start = i
    while start > 0 and segments[start - 1] == segments[i]:
        start -= 1
    if mask.window is not None and not i - j < mask.window:
        return False
    if mask.sparsity is not None:
        size = mask.sparsity.block_size
        query_block, key_block = (i - start) // size, (j - start) // size
        last = range(query_block - mask.sparsity.local_blocks + 1, query_block + 1)
        return key_block in last or key_block in range(mask.sparsity.global_blocks)
    return True


def naive(q, k, v, segments, mask, offset=0):
    """One query at a time, in float64; without segments the row is one document."""
    segments = np.zeros((2, k.shape[1]), int) if segments is None else np.asarray(segments)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i in np.ndindex(q.shape[:2]):
        seen = [j for j in range(k.shape[1]) if sees(segments[b].tolist(), mask, i + offset, j)]
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            scores = k[b, seen, g] @ q[b, i, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, h] = (weights / weights.sum()) @ v[b, seen, g]
    return out


@functools.cache
def jitted(mask, backend):
    """(q, k, v, segments or None) -> attention."""

    def run(q, k, v, segments):
        starts = None if segments is None else document_starts(segments)
        return attention(q, k, v, starts, mask, backend=backend)

    return jax.jit(run)


@functools.cache
def with_gradients(mask, backend):
    """Output and gradients of a fixed random projection of it, one program."""

    def run(q, k, v, segments):
        starts = None if segments is None else document_starts(segments)

        def score(q, k, v):
            out = attention(q, k, v, starts, mask, backend=backend)
            weights = jax.random.normal(jax.random.key(0), out.shape)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.grad(score, (0, 1, 2), has_aux=True)(q, k, v)

    return jax.jit(run)


@pytest.mark.parametrize(("backend", "mask"), TAKES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "isolated"), [(4, 2, True), (3, 3, False)])
def test_equals_a_loop_in_numpy(backend, mask, heads, groups, isolated):
    q, k, v, segments = make(0, 17, heads, groups)
    segments = segments if isolated else None
    assert_allclose(jitted(mask, backend)(q, k, v, segments), naive(q, k, v, segments, mask), atol=2e-6)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_queries_at_an_offset_see_the_cache(mask):
    q, k, v, segments = make(1, 3, keys=11)
    segments = segments.at[:, :2].set(0).at[:, 9:].set(0)  # padding on the left, free slots
    starts = document_starts(segments)[:, 6:9]
    ours = jax.jit(functools.partial(attention, mask=mask))(q, k, v, starts, q_offset=6)
    assert_allclose(ours, naive(q, k, v, segments, mask, offset=6), atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "window"), [(b, None) for b in BACKENDS] + [("reference", 5), ("blockwise", 5)]
)
def test_equals_jaxs_own(backend, window):
    q, k, v, segments = make(2, 24)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    theirs = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
    )
    assert_allclose(jitted(Mask(window), backend)(q, k, v, segments), theirs, atol=2e-6)


# Lengths below, at, just past and far from a multiple of the block; windows inside and across blocks; blocks
# of sparsity smaller and larger than those of queries, and global ones that reach into the local ones.
GRID = [
    (1, Mask(1000), 4, 2, True),
    (128, Mask(128), 4, 1, False),
    (129, CAUSAL, 4, 2, True),
    (257, Mask(129), 4, 2, True),
    (260, Mask(1), 2, 2, True),
    (391, Mask(sparsity=Sparsity(16, 2, 1)), 4, 2, True),
    (260, Mask(sparsity=Sparsity(16, 2, 1)), 2, 1, False),
    (260, Mask(sparsity=Sparsity(7, 3, 5)), 6, 3, True),
    (256, Mask(sparsity=Sparsity(64, 2, 0)), 2, 1, True),
    (260, Mask(sparsity=Sparsity(32, 1, 100)), 2, 1, True),
]


@pytest.mark.parametrize(("length", "mask", "heads", "groups", "isolated"), GRID, ids=str)
def test_blockwise_equals_the_reference(length, mask, heads, groups, isolated):
    q, k, v, segments = make(3, length, heads, groups)
    agree("blockwise", q, k, v, segments if isolated else None, mask)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "isolated"), [(256, 4, 2, 16, True), (128, 2, 2, 24, False)]
)
def test_pallas_equals_the_reference(length, heads, groups, size, isolated):
    q, k, v, segments = make(3, length, heads, groups, size=size)
    agree("pallas", q, k, v, segments if isolated else None, CAUSAL)


def agree(backend, q, k, v, segments, mask):
    expected, out = with_gradients(mask, "reference")(q, k, v, segments)
    got, ours = with_gradients(mask, backend)(q, k, v, segments)
    assert_allclose(ours, out, atol=3e-6)
    for name, mine, theirs in zip("qkv", got, expected, strict=True):
        # With a window of one key the gradients of q and k are zero but for rounding.
        assert_allclose(mine, theirs, atol=1e-5 * max(np.abs(theirs).max(), 0.3), err_msg=name)


def test_long_rows_have_larger_blocks():
    """Past the greatest number of blocks the blocks grow, and the numbers stay."""
    length, mask = 2100, Mask(sparsity=Sparsity(100, 3, 2))
    assert block_size(length) > block_size(300)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 4)), jnp.float32) for _ in range(3))
    segments = jnp.asarray(1 + np.arange(length)[None] // 900, jnp.int32)
    ours, theirs = (jitted(mask, backend)(q, k, v, segments) for backend in ("blockwise", "reference"))
    assert_allclose(ours, theirs, atol=3e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=20), st.sampled_from(TAKES))
def test_any_segments(segments, taken):
    """Also ids that come back after others, as another document, and padding (0), which sees itself."""
    backend, mask = taken
    q, k, v, _ = make(5, 20)
    segments = jnp.asarray([segments, segments[::-1]], jnp.int32)
    assert_allclose(jitted(mask, backend)(q, k, v, segments), naive(q, k, v, segments, mask), atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "mask"), [t for t in TAKES if t[1] in (CAUSAL, Mask(4), SPARSE)], ids=str
)
def test_editing_a_document_leaves_its_neighbour_alone(backend, mask):
    """Bitwise, though the edit is as large as float32 allows without overflow of the scores."""
    q, k, v, _ = make(6, 20)
    segments = jnp.asarray([[1] * 8 + [2] * 12, [5] * 8 + [0] * 12], jnp.int32)
    edited = [x.at[:, :8].multiply(1e6) for x in (q, k, v)]
    run = with_gradients(mask, backend)
    (dq, dk, dv), out = run(q, k, v, segments)
    (dq2, dk2, dv2), out2 = run(*edited, segments)
    for before, after in [(out, out2), (dq, dq2), (dk, dk2), (dv, dv2)]:
        np.testing.assert_array_equal(before[:, 8:], after[:, 8:])
    assert np.all(np.abs(out[:, :8] - out2[:, :8]).max(-1) > 1)


# XLA's CPU backend has other products for real sizes than for tiny ones.
@pytest.mark.parametrize(
    ("backend", "mask", "length", "size"),
    [(backend, CAUSAL, 256, 64) for backend in BACKENDS]
    + [("blockwise", CAUSAL, 40, 6), ("blockwise", SPARSE, 256, 64)],
)
def test_bfloat16_is_near_float32(backend, mask, length, size):
    q, k, v, segments = make(7, length, size=size)
    expected, out = with_gradients(mask, "reference")(q, k, v, segments)
    halves = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got, ours = with_gradients(mask, backend)(*halves, segments)
    assert ours.dtype == jnp.bfloat16
    assert_allclose(ours.astype(jnp.float32), out, atol=0.03 * np.abs(out).max())
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert_allclose(mine.astype(jnp.float32), theirs, atol=0.03 * np.abs(theirs).max())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_maps_are_what_the_reference_computes(mask):
    q, k, v, segments = make(8, 15)
    starts = document_starts(segments)
    weights = attention_weights(q, k, starts, mask)
    assert weights.shape == (2, 2, 2, 15, 15)
    assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    for b, row in enumerate(segments.tolist()):
        visible = [[sees(row, mask, i, j) for j in range(15)] for i in range(15)]
        assert np.all((np.asarray(weights[b]) > 0) == visible)
    np.testing.assert_array_equal(
        weighted_values(weights, v), attention(q, k, v, starts, mask, backend="reference")
    )


@pytest.mark.parametrize(
    "mask", [*MASKS, Mask(30), Mask(sparsity=Sparsity(8, 3, 2)), Mask(sparsity=Sparsity(8, 1, 0))], ids=str
)
@pytest.mark.parametrize("length", [1, 8, 50, 64])
def test_count_of_visible_keys(mask, length):
    """As an area: each edge that steps along the diagonal runs through the middle of its keys."""
    i, j = np.indices((length, length))
    area = mask.visible(i, j).sum() - length / 2
    if mask.window is not None:
        area += max(length - mask.window, 0) / 2
    assert mask.mean_visible(length) == pytest.approx(area / length)


def pairs(length: int, mask: Mask, isolated: bool) -> int:
    """Queries times keys of every block that blockwise attention should compute."""
    count, size = 0, block_size(length)
    for first in range(0, length, size):
        reach, fetched = first, 0
        if mask.window is not None:
            reach = min(first, mask.window - 1)
        elif mask.sparsity is not None:
            block, local = mask.sparsity.block_size, mask.sparsity.local_blocks
            # A document that begins anywhere may have a block's edge anywhere.
            before = local * block - 1 if isolated else first % block + (local - 1) * block
            reach = min(first, before)
            fetched = min(mask.sparsity.global_blocks * block, first - reach)
        queries = min(size, length - first)
        count += queries * (reach + queries + fetched)
    return count


LONG = [CAUSAL, Mask(256), Mask(sparsity=Sparsity(64, 4, 1))]


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("mask", LONG, ids=["full", "window", "sparse"])
def test_products_are_those_of_the_blocks_needed(mask, isolated):
    """Two products forward and five backward over these pairs, counted in the traced program."""
    length, heads, size = 4096, 2, 8
    q = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if isolated else None
    traced = jax.make_jaxpr(with_gradients(mask, "blockwise"))(q, q, q, segments)
    counted = sum(flops for _, flops in products(traced.jaxpr))
    assert counted == 2 * 7 * heads * size * pairs(length, mask, isolated)
    computed, needed = counted / (2 * 7 * heads * size * length), mask.mean_visible(length)
    assert computed < needed + block_size(length) + 64
    if mask != CAUSAL:
        assert pairs(length, mask, isolated) < 0.3 * pairs(length, CAUSAL, isolated)


def test_aligned_blocks_cost_what_the_formula_says():
    """Rows of one document: what is computed beyond the formula is half of each block on the diagonal."""
    mask, length = Mask(sparsity=Sparsity(128, 3, 2)), 2048
    assert block_size(length) == 128
    assert pairs(length, mask, isolated=False) == length * (mask.mean_visible(length) + 128 / 2)


def test_a_mask_that_a_backend_cannot_honour_is_an_error():
    q, k, v, segments = make(9, 5, keys=8)
    starts = document_starts(segments)
    for backend in ("blockwise", "pallas", "cudnn"):
        with pytest.raises(ValueError, match=f"{backend} attention needs .* use 'reference'"):
            attention(q, k, v, starts[:, :5], backend=backend)
    q, k, v, segments = make(9, 5)
    starts = document_starts(segments)
    for offset in (3, jnp.int32(0)):
        with pytest.raises(ValueError, match="use 'reference'"):
            attention(q, k, v, starts, q_offset=offset, backend="blockwise")
    for backend in ("pallas", "cudnn"):
        with pytest.raises(ValueError, match=f"{backend} attention has no block sparsity"):
            attention(q, k, v, None, SPARSE, backend=backend)
    with pytest.raises(ValueError, match="a multiple of 128 tokens, not 40"):
        attention(*make(9, 40)[:3], None, backend="pallas")
    with pytest.raises(ValueError, match="pallas attention has no window"):
        attention(q, k, v, starts, Mask(3), backend="pallas")
    with pytest.raises(ValueError, match="can't keep documents apart"):
        attention(q, k, v, starts, backend="cudnn")
    with pytest.raises(ValueError, match="NVIDIA GPUs only"):
        attention(q, k, v, None, backend="cudnn")


LLAMA = ModelConfig(128, 1, 64, 2, 1, 64, 64, 4096)
GPU = {"platform": "gpu", "dtype": "bfloat16", "isolated": False}


def choose(asked, model=None, **changes):
    where = {"platform": "cpu", "dtype": "float32", "length": 256, "isolated": True, "context": 1}
    where |= changes
    return choose_backend(asked, where.pop("platform"), dataclasses.replace(LLAMA, **model or {}), **where)


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({}, {}, "blockwise"),
        ({"dtype": "bfloat16"}, {"window": 9}, "blockwise"),
        ({"platform": "tpu"}, {}, "blockwise"),
        (GPU, {}, "cudnn"),
        (GPU | {"dtype": "float16"}, {"window": 9}, "cudnn"),
        (GPU, {"sparsity": Sparsity(64, 4, 1)}, "blockwise"),
        (GPU, {"head_dim": 36}, "pallas"),
        (GPU | {"dtype": "float32"}, {}, "blockwise"),
        (GPU | {"context": 2}, {}, "ring"),
        (GPU | {"context": 2}, {"sparsity": Sparsity(2, 1, 1)}, "blockwise"),
        (GPU | {"isolated": True}, {}, "pallas"),
        (GPU | {"isolated": True}, {"window": 9}, "blockwise"),
        (GPU | {"isolated": True}, {"head_dim": 256}, "blockwise"),
        (GPU | {"isolated": True, "length": 100}, {}, "blockwise"),
    ],
)
def test_automatic_choice_of_a_backend(changes, model, expected):
    assert choose("auto", model, **changes) == expected
    assert choose(expected, model, **changes) == expected
    assert choose("reference", model, **changes) == "reference"


@pytest.mark.parametrize(
    ("asked", "changes", "model", "message"),
    [
        ("cudnn", {}, {}, "runs on NVIDIA GPUs, not on cpu: set it to blockwise or to auto"),
        ("pallas", {}, {}, "runs on NVIDIA GPUs, not on cpu: set it to blockwise"),
        ("cudnn", GPU | {"isolated": True}, {}, r"\(data\.isolate\): set it to pallas"),
        ("cudnn", GPU | {"dtype": "float32"}, {}, r"\(train\.dtype\): set it to blockwise"),
        ("cudnn", GPU, {"sparsity": Sparsity(64, 4, 1)}, r"\(model\.sparsity\): set it to blockwise"),
        ("cudnn", GPU, {"head_dim": 36}, r"model\.head_dim, not 36: set it to pallas"),
        ("pallas", GPU, {"window": 9}, r"\(model\.window\): set it to cudnn"),
        ("pallas", GPU | {"length": 200}, {}, r"data\.sequence_length, not 200: set it to cudnn"),
        ("pallas", GPU, {"head_dim": 8}, r"model\.head_dim of 16 to 128, not 8: set it to cudnn"),
        ("pallas", GPU | {"context": 2}, {}, r"\(mesh\.context\): set it to ring"),
        ("ring", GPU, {}, r"divided over devices \(mesh\.context\): set it to"),
        ("ring", GPU | {"context": 3}, {}, r"takes a multiple of 6 .* set it to blockwise"),
    ],
)
def test_a_backend_that_cannot_is_refused_with_one_that_can(asked, changes, model, message):
    with pytest.raises(UserError, match=rf"^train\.attention is {asked}, which .*{message}"):
        choose(asked, model, **changes)


@pytest.mark.parametrize("isolated", [True, False])
def test_pallas_lowers_for_cuda_forward_and_backward(isolated):
    """Real sizes, on a machine that has no GPU."""
    q, k, _, segments = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in make(0, 256, 4, 2, size=64))
    segments = jax.ShapeDtypeStruct(segments.shape, jnp.int32) if isolated else None

    def loss(q, k, v, segments):
        return pallas_attention(q, k, v, segments).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mha_forward" in text and "mha_backward" in text


@pytest.mark.parametrize(
    ("backend", "mask", "length"),
    [("pallas", CAUSAL, 128), ("blockwise", Mask(sparsity=Sparsity(16, 2, 1)), 200)],
)
def test_on_a_mesh_each_device_has_its_own_rows_and_heads(backend, mask, length):
    """As on one device, and no collective moves any."""
    q, k, v, segments = (jnp.concatenate([x] * 2) for x in make(3, length, size=16))
    expected, out = with_gradients(mask, backend)(q, k, v, segments)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        heads, rows = (
            NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, *t)) for t in (["tensor"], [])
        )
        run = jax.jit(with_gradients(mask, backend).__wrapped__, out_shardings=((heads,) * 3, heads))
        placed = *(jax.device_put(x, heads) for x in (q, k, v)), jax.device_put(segments, rows)
        hlo = run.lower(*placed).compile().as_text()
        got, ours = run(*placed)
    assert_allclose(ours, out, atol=1e-6)
    for mine, theirs in zip(got, expected, strict=True):
        assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())
    assert not collectives(hlo)


def test_kernels_refuse_rows_that_are_divided():
    q, k, v, _ = make(3, 128, size=16)
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))),
        pytest.raises(ValueError, match="divided over devices"),
    ):
        attention(q, k, v, None, backend="pallas")


def test_cudnn_is_called_as_a_mask_of_the_same_keys(monkeypatch):
    """Its own kernel needs a GPU: here JAX computes what the same arguments mean."""
    q, k, v, _ = make(4, 40)
    meant = jax.nn.dot_product_attention
    seen = []

    def stand_in(*args, implementation, **options):
        seen.append(implementation)
        return meant(*args, implementation="xla", **options)

    monkeypatch.setattr(fused.jax.nn, "dot_product_attention", stand_in)
    for window in (None, 1, 7):
        assert_allclose(cudnn_attention(q, k, v, Mask(window)), naive(q, k, v, None, Mask(window)), atol=2e-6)
    assert seen == ["cudnn"] * 3
