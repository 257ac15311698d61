"""Ring attention against the reference on whole sequences: values, gradients, order, work."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from programs import collectives, partitioned, products

from core.mesh import make_mesh, shardings
from core.options import MeshConfig
from llm.model import ring
from llm.model.attention import attention
from llm.model.config import Sparsity
from llm.model.masks import CAUSAL, Mask, document_starts
from llm.model.ring import from_zigzag, to_zigzag

LENGTH = 48
MESHES = [{"context": 8}, {"data": 2, "tensor": 2, "context": 2}, {"fsdp": 2, "context": 4}, {"context": 3}]


def mesh_of(sizes):
    options = MeshConfig(**{"data": 1} | sizes)
    return make_mesh(options, jax.devices()[: int(np.prod([*sizes.values()]))])


def make(dtype=jnp.float32):
    """q, k, v and segment ids of documents of many lengths; the last row is one document."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, LENGTH, 4, 6))
    k, v = rng.normal(size=(2, 2, LENGTH, 2, 6))
    segments = 1 + np.cumsum(rng.random((2, LENGTH)) < 0.1, axis=1)
    segments[-1] = 1
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(segments, jnp.int32)


def with_gradients(run):
    def score(q, k, v, starts):
        out = run(q, k, v, starts).astype(jnp.float32)
        return jnp.sum(out * jax.random.normal(jax.random.key(0), out.shape)), out

    return jax.jit(jax.grad(score, (0, 1, 2), has_aux=True))


def in_a_ring(q, k, v, starts, mask=CAUSAL):
    q, k, v, starts = jax.tree.map(to_zigzag, (q, k, v, starts))
    return from_zigzag(attention(q, k, v, starts, mask, backend="ring"))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("mask", "isolated"), [(CAUSAL, True), (CAUSAL, False), (Mask(window=7), True)], ids=str
)
def test_values_and_gradients_are_those_of_the_whole_sequence(sizes, mask, isolated, monkeypatch):
    monkeypatch.setattr(ring, "QUERIES", 2)  # several blocks in a piece
    q, k, v, segments = make()
    starts = document_starts(segments) if isolated else None
    expected = with_gradients(lambda *x: attention(*x, mask))(q, k, v, starts)
    with jax.set_mesh(mesh_of(sizes)):
        got = with_gradients(functools.partial(in_a_ring, mask=mask))(q, k, v, starts)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_bfloat16():
    q, k, v, segments = make(jnp.bfloat16)
    starts = document_starts(segments)
    exact = with_gradients(attention)(*(x.astype(jnp.float32) for x in (q, k, v)), starts)
    with jax.set_mesh(mesh_of({"context": 4})):
        gradients, out = with_gradients(in_a_ring)(q, k, v, starts)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}
    for ours, theirs in zip(jax.tree.leaves((gradients, out)), jax.tree.leaves(exact), strict=True):
        assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_each_device_has_an_early_and_a_late_piece(n):
    x = jnp.arange(2 * 2 * n * 3).reshape(2, -1)  # pieces of three
    with jax.set_mesh(mesh_of({"context": n})):
        there, back = jax.jit(lambda x: (to_zigzag(x), from_zigzag(to_zigzag(x))))(x)
    assert_array_equal(back, x)
    pieces = np.asarray(there)[0].reshape(n, 2, 3)[:, :, 0] // 3
    assert pieces.tolist() == [[r, 2 * n - 1 - r] for r in range(n)]


@pytest.mark.parametrize("n", [2, 8])
def test_every_device_does_the_same_and_half_of_all(n):
    """Of (2n)^2 products of pieces, n devices do 2n + 1 each: the triangle with its diagonal."""
    q, k, v, segments = make()
    with jax.set_mesh(mesh_of({"context": n})):
        traced = jax.make_jaxpr(in_a_ring)(q, k, v, document_starts(segments))
    done = sum(flops for _, flops in products(traced.jaxpr))  # of one device
    whole = sum(flops for _, flops in products(jax.make_jaxpr(attention)(q, k, v, None).jaxpr))
    assert done * n == whole * n * (2 * n + 1) / (2 * n) ** 2


def test_keys_and_values_go_round_and_nothing_is_gathered():
    def both_passes(q, k, v, starts, g):
        return jax.vjp(lambda q, k, v: attention(q, k, v, starts, backend="ring"), q, k, v)[1](g)

    q, k, v, segments = make()
    mesh = mesh_of({"context": 4})
    rows = ("act_batch", "act_seq")
    heads, keys = (*rows, "act_heads", None), (*rows, "act_kv_heads", None)
    places = tuple(shardings(mesh, [heads, keys, keys, rows, heads]))
    with jax.set_mesh(mesh):
        jitted = jax.jit(both_passes, in_shardings=places, out_shardings=places[:3])
        lowered = jitted.lower(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, segments, q)))
    # Keys and values before the loop and in it, forward and backward; their gradients after it as well.
    kinds = [kind for kind, _, _ in collectives(partitioned(lowered))]
    assert kinds == ["collective-permute"] * (2 * 2 + 2 * 2 + 2 * 3)


def test_a_longer_sequence_takes_memory_in_proportion():
    """Of temporaries a device needs per token; the whole map of attention would double it each time."""

    def bytes_per_token(length):
        shapes = [(1, length, 4, 16), (1, length, 2, 16), (1, length, 2, 16)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        starts = jax.ShapeDtypeStruct((1, length), jnp.int32)
        with jax.set_mesh(mesh_of({"context": 8})):
            compiled = (
                with_gradients(lambda *x: attention(*x, backend="ring")).lower(*arrays, starts).compile()
            )
        return compiled.memory_analysis().temp_size_in_bytes / length

    short, long = bytes_per_token(1 << 13), bytes_per_token(1 << 15)
    assert long < 1.3 * short


def test_layers_keep_no_masks():
    """They depend on places alone: without care JAX forms all of them before the first layer."""
    length, n, heads = 1024, 4, 4

    def layers(x, starts):
        def layer(x, _):
            out = attention(x, x[:, :, :2], x[:, :, :2], starts, backend="ring")
            return x + out, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0] ** 2)

    x, starts = jnp.zeros((1, length, heads, 6)), jnp.zeros((1, length), jnp.int32)
    with jax.set_mesh(mesh_of({"context": n})):
        program = jax.jit(jax.grad(layers)).lower(x, starts).compile().as_text()
    masks = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\bpred\[([\d,]+)\]", program)]
    assert max(masks) <= heads * ring.QUERIES * length // (2 * n), "that of one block of queries"


def test_what_it_lacks_is_an_error():
    q, k, v, _ = make()
    with pytest.raises(ValueError, match="ring attention has no block sparsity"):
        attention(q, k, v, None, Mask(sparsity=Sparsity(2, 1, 1)), backend="ring")
