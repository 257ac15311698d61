"""The chunked cross entropy: equal to the plain one, in fewer bytes and no more products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from programs import collectives, largest_array, partitioned, products

from core.mesh import make_mesh, shardings
from core.options import MeshConfig
from llm.model.loss import cross_entropy

BATCH, LENGTH, EMBED, VOCAB = 3, 30, 20, 54
CHUNKS = [1, 7, 10, 30, 512]  # 7 doesn't divide 30: the last chunk is padded


def make(dtype=jnp.float32):
    """Hidden states, kernel, targets and ragged weights, zeros and fractions among them."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, EMBED)), dtype)
    kernel = jnp.asarray(rng.normal(size=(VOCAB, EMBED)) / 3, jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weights = rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.7)
    weights[1, 4:] = 0
    return hidden, kernel, targets, jnp.asarray(weights, jnp.float32)


def plain(hidden, kernel, targets, weights, *, z_loss):
    """The same objective over all logits at once, by JAX's own derivative."""
    logits = hidden.astype(jnp.float32) @ kernel.T
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sums = jnp.sum(weights * nll), jnp.sum(weights * log_z**2)
    return sums[0] + z_loss * sums[1], sums


def with_gradients(loss, **options):
    """Value and gradients of a multiple of the loss, since the mean is what training differentiates."""
    return jax.jit(
        jax.value_and_grad(
            lambda h, w, *rest: jax.tree.map(lambda x: x / 7, loss(h, w, *rest, **options)),
            (0, 1),
            has_aux=True,
        )
    )


@functools.cache
def all_at_once(z_loss: float):
    return with_gradients(plain, z_loss=z_loss)(*make())


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_equals_full(chunk, z_loss):
    batch = make()
    (expected, sums), gradients = all_at_once(z_loss)
    (ours, our_sums), our_gradients = with_gradients(cross_entropy, z_loss=z_loss, chunk=chunk)(*batch)
    assert_allclose(ours, expected, rtol=1e-6)
    assert_allclose(our_sums, sums, rtol=1e-6)
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_without_a_derivative_it_is_the_same_number():
    batch = make()
    ours, sums = jax.jit(functools.partial(cross_entropy, z_loss=0.1, chunk=7))(*batch)
    expected, expected_sums = plain(*batch, z_loss=0.1)
    assert_allclose([ours, *sums], [expected, *expected_sums], rtol=1e-6)


def test_tied_weights_collect_both_gradients():
    """As the model has it where its head is the embedding: one array, two uses."""
    _, kernel, targets, weights = make()
    tokens = jnp.roll(targets, 1, axis=1)

    def tied(loss, **options):
        return jax.jit(jax.grad(lambda w: loss(w[tokens], w, targets, weights, **options)[0]))(kernel)

    theirs = tied(plain, z_loss=0.1)
    ours = tied(cross_entropy, z_loss=0.1, chunk=7)
    assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_numerical_gradient():
    """Central differences, in float64 by hand: no automatic derivative has a part in it."""
    hidden, kernel, targets, weights = map(np.asarray, make())

    def value(hidden, kernel):
        logits = hidden @ kernel.T
        log_z = np.log(np.exp(logits).sum(-1))
        nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weights * (nll + 0.1 * log_z**2)).sum()

    (_, _), gradients = with_gradients(cross_entropy, z_loss=0.1, chunk=10)(hidden, kernel, targets, weights)
    rng = np.random.default_rng(1)
    directions = rng.normal(size=hidden.shape), rng.normal(size=kernel.shape)
    epsilon = 1e-5
    ahead = value(*(x + epsilon * d for x, d in zip((hidden, kernel), directions, strict=True)))
    behind = value(*(x - epsilon * d for x, d in zip((hidden, kernel), directions, strict=True)))
    slope = sum((np.asarray(g) * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert_allclose(slope, (ahead - behind) / (2 * epsilon) / 7, rtol=1e-5)


def test_bfloat16():
    """bfloat16 hidden states: gradients to their precision, the kernel's in float32."""
    hidden, kernel, *rest = make(jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    (expected, _), gradients = with_gradients(plain, z_loss=0.1)(hidden, rounded, *rest)
    (ours, _), (d_hidden, d_kernel) = with_gradients(cross_entropy, z_loss=0.1, chunk=10)(
        hidden, kernel, *rest
    )
    assert ours.dtype == d_kernel.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    assert_allclose(ours, expected, rtol=1e-5)
    for mine, theirs in zip((d_hidden, d_kernel), gradients, strict=True):
        theirs = theirs.astype(jnp.float32)
        assert_allclose(mine.astype(jnp.float32), theirs, rtol=0, atol=0.01 * np.abs(theirs).max())


def test_one_chunk_of_bfloat16_has_its_products_on_the_cpu():
    """Tied, and as large as real ones: XLA computes small products by another path."""
    hidden, kernel = jnp.ones((4, 256, 128), jnp.bfloat16), jnp.ones((2048, 128), jnp.float32)
    targets, weights = jnp.zeros((4, 256), jnp.int32), jnp.ones((4, 256), jnp.float32)

    def tied(kernel):
        return cross_entropy(hidden + kernel[targets].astype(jnp.bfloat16), kernel, targets, weights)[0]

    assert np.isfinite(jax.jit(jax.grad(tied))(kernel)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_three_products_and_never_all_logits(dtype):
    gradient = with_gradients(cross_entropy, z_loss=0.1, chunk=10)
    batch = make(dtype)
    found = products(jax.make_jaxpr(gradient)(*batch).jaxpr)
    assert sum(flops for _, flops in found) == 3 * 2 * BATCH * LENGTH * EMBED * VOCAB
    for product, _ in found:
        assert [x.aval.dtype for x in product.invars] == [dtype, dtype]
    program = gradient.lower(*batch).compile().as_text()
    assert BATCH * 10 * VOCAB <= largest_array(program) < BATCH * LENGTH * VOCAB


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 8}, [("all-reduce", (24, 56))]),
        ({"data": 1, "fsdp": 8}, [("all-gather", (56, 24)), ("reduce-scatter", (3, 56))]),
        (
            {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
            [
                ("all-gather", (8, 32, 24)),  # hidden states, and the sums of their gradients
                ("all-gather", (28, 24)),
                ("all-reduce", (12, 28)),  # over context
                ("reduce-scatter", (8, 16, 24)),
                ("reduce-scatter", (12, 28)),
            ],
        ),
    ],
    ids=str,
)
def test_the_kernel_and_the_gradients_travel_once_not_for_each_chunk(sizes, expected):
    """Within the loop over chunks, only what a softmax over a divided vocabulary has to add up."""
    embed, vocab = 24, 56
    mesh = make_mesh(MeshConfig(**sizes))
    batch = [((16, 64, embed), jnp.float32), ((vocab, embed), jnp.float32)]
    batch += [((16, 64), jnp.int32), ((16, 64), jnp.float32)]
    rows = ("act_batch", "act_seq")
    axes = [("act_batch", "act_stream", None), ("vocab", "embed"), rows, rows]
    places = tuple(shardings(mesh, axes))
    gradient = jax.grad(lambda *batch: cross_entropy(*batch, z_loss=0.1, chunk=8)[0], (0, 1))
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradient, in_shardings=places, out_shardings=places[:2])
        lowered = jitted.lower(*(jax.ShapeDtypeStruct(*one) for one in batch))
    found = collectives(partitioned(lowered))
    outside = [(kind, shape) for kind, shape, inside in found if not inside and len(shape) > 1]
    assert sorted(outside) == expected
    tokens = (8, 8)  # of a chunk on one device: their maxima and sums
    inside = [("all-reduce", tokens)] * 2 if "tensor" in sizes else []
    assert [(kind, shape) for kind, shape, inside in found if inside] == inside


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
        {"data": 1, "tensor": 8},
    ],
    ids=str,
)
def test_sharded_equals_unsharded(sizes):
    hidden, kernel, targets, weights = make()
    rows = lambda x: jnp.tile(x, (8, *[1] * (x.ndim - 1)))[:8, :24]  # noqa: E731
    batch = rows(hidden), jnp.concatenate([kernel, kernel[:2]]), rows(targets), rows(weights)
    expected = with_gradients(cross_entropy, z_loss=0.1, chunk=7)(*batch)
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        got = with_gradients(cross_entropy, z_loss=0.1, chunk=7)(*batch)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
