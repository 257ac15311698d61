"""The Transformer as a whole: ways to compute it, packing, precision, captured values, initial values."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from programs import equations, products
from tiny import random_params

from llm.config import TrainConfig
from llm.data.loader import Batch, across_documents
from llm.model.attention import Backend
from llm.model.config import ModelConfig, Sparsity
from llm.model.transformer import Compute, blueprint
from llm.step import gradients

# Every option at once, and sizes that tell their axes apart.
ODD = ModelConfig(
    vocab_size=59,
    num_layers=3,
    embed_dim=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=36,
    max_length=64,
    norm="layer",
    bias="all",
    qk_norm=True,
    parallel_residual=True,
    tied_head=True,
    window=7,
    rope_fraction=0.5,
)
LLAMA = ModelConfig(
    vocab_size=61,
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=36,
    max_length=64,
)
TRAIN = TrainConfig(steps=1, z_loss=1e-3, loss_chunk=9)
SPARSE = dataclasses.replace(LLAMA, sparsity=Sparsity(3, 1, 1))
BACKENDS = ["reference", "blockwise"]
# Each backend that keeps documents apart, with each mask that it takes.
ISOLATED = [(config, backend) for config in (ODD, LLAMA, SPARSE) for backend in BACKENDS]
ISOLATED.append((LLAMA, "pallas"))
NAMES = [f"{mask}-{backend}" for mask in ("window", "full", "sparse") for backend in BACKENDS] + [
    "full-pallas"
]
LENGTH = 24
DOCUMENTS = [9, 5, 7]  # and three tokens of padding


params = functools.partial(random_params, deviation=0.2)


def rows(split: bool) -> Batch:
    """Three documents in one row, the other rows padding; or `split`, each in a row of its own."""
    rng = np.random.default_rng(1)
    shape = (len(DOCUMENTS), LENGTH)
    batch = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
    start = 0
    for i, size in enumerate(DOCUMENTS):
        place = (i, slice(0, size)) if split else (0, slice(start, start + size))
        text = rng.integers(0, 59, size + 1)
        batch.tokens[place], batch.targets[place] = text[:-1], text[1:]
        batch.positions[place] = np.arange(size)
        batch.segment_ids[place] = i + 1
        batch.weights[place] = 1
        start += size
    return batch


@functools.cache
def gradient(config: ModelConfig, **compute):
    """Jitted (params, batch) -> (gradients, loss), as the training step has them."""
    model = blueprint(config, Compute(**compute))

    def run(params, batch):
        grads, means = gradients(model, TRAIN, params, batch)
        return grads, means["loss"]

    return jax.jit(run)


@functools.cache
def logits(config: ModelConfig, backend: Backend):
    def run(params, batch):
        model = blueprint(config, Compute(attention=backend)).bind(params)
        return model.logits(model(batch.tokens, batch.positions, batch.segment_ids).hidden)

    return jax.jit(run)


def assert_same(got, expected, tolerance=1e-5):
    assert_allclose(got[1], expected[1], rtol=tolerance)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.parametrize(
    "compute",
    [{"remat": "full", "scan_layers": False}, {"attention": "blockwise", "remat": "dots"}],
    ids=str,
)
def test_how_it_is_computed_does_not_change_what(compute):
    batch = rows(split=False)
    assert_same(gradient(ODD, **compute)(params(ODD), batch), gradient(ODD)(params(ODD), batch))


@pytest.mark.parametrize(("config", "backend"), ISOLATED, ids=NAMES)
def test_packed_equals_unpacked(config, backend):
    run = gradient(config) if backend == "reference" else gradient(config, attention=backend, remat="dots")
    assert_same(run(params(config), rows(split=False)), run(params(config), rows(split=True)))


@pytest.mark.parametrize("backend", [*BACKENDS, "pallas"])
def test_documents_that_are_not_kept_apart_are_one(backend):
    """As if the row were a single document; and a token sees what stands before it in any of them."""
    batch = rows(split=False)
    joined = across_documents(batch)
    assert joined.segment_ids is None
    ones = np.ones_like(batch.segment_ids)
    run = functools.partial(logits(LLAMA, backend), params(LLAMA))
    assert_allclose(run(joined), run(joined._replace(segment_ids=ones)), atol=1e-5)
    tokens = np.array(batch.tokens)
    tokens[0, 2] += 1
    moved = np.abs(run(joined._replace(tokens=tokens)) - run(joined))[0].max(-1)
    assert np.all(moved[:2] == 0) and np.all(moved[2:] > 1e-6)
    assert_same(
        gradient(LLAMA, attention=backend)(params(LLAMA), joined), gradient(LLAMA)(params(LLAMA), joined)
    )


@pytest.mark.parametrize(("config", "backend"), ISOLATED, ids=NAMES)
def test_editing_a_document_leaves_its_neighbour_alone(config, backend):
    """Bitwise; and inside the document that is edited, all that stands before the edit."""
    batch = rows(split=False)
    run = functools.partial(logits(config, backend), params(config))
    before, segments = np.asarray(run(batch)), np.asarray(batch.segment_ids[0])
    for edited in range(LENGTH):
        tokens = np.array(batch.tokens)
        tokens[0, edited] += 1
        after = np.asarray(run(batch._replace(tokens=tokens)))
        same = (segments != segments[edited]) | (np.arange(LENGTH) < edited)
        np.testing.assert_array_equal(after[0, same], before[0, same])
        if segments[edited] and config.sparsity is None:  # else a block may be out of reach in three layers
            assert np.all(np.abs(after[0, ~same] - before[0, ~same]).max(-1) > 1e-6)


def test_products_by_remat_policy():
    """`dots` runs attention's forward products again and no others; `full` others too."""

    def count(remat):
        run = gradient(LLAMA, remat=remat)
        return sum(f for _, f in products(jax.make_jaxpr(run)(blueprint(LLAMA).shapes, rows(False)).jaxpr))

    tokens, pairs = len(DOCUMENTS) * LENGTH, len(DOCUMENTS) * LENGTH**2
    attention = 4 * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim * pairs
    assert count("dots") == count("none") + attention
    kernels = jax.tree_util.tree_leaves_with_path(blueprint(LLAMA).shapes["blocks"])
    forward = sum(2 * tokens * leaf.size for path, leaf in kernels if "kernel" in str(path))
    # The block's last product isn't needed for any derivative.
    down = 2 * tokens * LLAMA.num_layers * LLAMA.mlp_dim * LLAMA.embed_dim
    assert count("full") == count("none") + attention + forward - down


@pytest.mark.parametrize("config", [ODD, LLAMA], ids=["odd", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_products_and_float32_sums(config, backend):
    """No product reads float32, forward or backward; no sum over tokens is rounded on its way."""
    run = gradient(config, dtype="bfloat16", attention=backend)
    traced = jax.make_jaxpr(run)(blueprint(config).shapes, rows(False))
    found = products(traced.jaxpr)
    assert len(found) > 20
    for product, _ in found:
        assert [x.aval.dtype for x in product.invars] == [jnp.bfloat16] * 2, product
        assert product.outvars[0].aval.dtype == jnp.float32, product
    for equation, _ in equations(traced.jaxpr):
        if equation.primitive.name in ("reduce_sum", "scatter-add", "cumsum"):
            assert equation.outvars[0].aval.dtype in (jnp.float32, jnp.int32), equation
    for leaf in traced.out_avals:
        assert leaf.dtype == jnp.float32


def test_bfloat16_is_near_float32():
    batch = rows(split=False)
    got, loss = gradient(ODD, dtype="bfloat16", remat="dots")(params(ODD), batch)
    expected, expected_loss = gradient(ODD)(params(ODD), batch)
    assert_allclose(loss, expected_loss, rtol=0.01)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs) < 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_values(backend):
    """Maps and hidden states are those that the result is made of, whatever the backend."""
    batch = rows(split=False)

    def run(params, batch, capture):
        model = blueprint(ODD, Compute(attention=backend)).bind(params)
        out = model(batch.tokens, batch.positions, batch.segment_ids, capture=capture)
        last = None if out.aux is None else model.norm(out.aux["hidden"][-1])
        return out, last

    plain, _ = jax.jit(functools.partial(run, capture=False))(params(ODD), batch)
    captured, last = jax.jit(functools.partial(run, capture=True))(params(ODD), batch)
    assert plain.aux is None and plain.cache is None
    assert_allclose(captured.hidden, plain.hidden, atol=1e-5)
    assert_allclose(last, captured.hidden, atol=1e-6)
    maps = captured.aux["attention"]
    assert maps.shape == (3, 3, 2, 3, LENGTH, LENGTH)
    assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    i, j = np.indices((LENGTH, LENGTH))
    segments = np.asarray(batch.segment_ids[0])
    visible = (j <= i) & (i - j < 7) & (segments[:, None] == segments)
    assert np.all((np.asarray(maps[:, 0]) > 0) == visible)


def test_a_step_with_pallas_lowers_for_cuda(monkeypatch):
    """The whole gradient as a GPU would run it: layers scanned, attention computed again on the way back."""
    config = dataclasses.replace(LLAMA, head_dim=64)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = functools.partial(
        gradients,
        blueprint(config, Compute("bfloat16", "pallas", "dots")),
        dataclasses.replace(TRAIN, loss_chunk=64),
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 256), x.dtype), rows(split=False))
    lowered = jax.jit(run).trace(blueprint(config).shapes, batch).lower(lowering_platforms=("cuda",))
    assert "mha_backward" in lowered.as_text()


def test_declarations():
    """Axes name every dimension; what multiplies activations is decayed, and nothing else."""
    for config in (ODD, LLAMA):
        model = blueprint(config)
        shapes = jax.tree_util.tree_leaves_with_path(model.shapes)
        axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
        for (path, shape), names, decay in zip(shapes, axes, jax.tree.leaves(model.decay), strict=True):
            name = jax.tree_util.keystr(path)
            assert len(names) == len(shape.shape), name
            assert ("layers" in names) == ("blocks" in name)
            assert decay == any(part in name for part in ("kernel", "embedding", "head']")), name
            sizes = {"embed": 24, "mlp": 36, "head_dim": 8, "kv_heads": 2, "layers": 3}
            for axis, size in zip(names, shape.shape, strict=True):
                assert sizes.get(axis, size) == size, name


def test_initial_values():
    """Standard deviations by fan-in, smaller where a product adds to the residual stream."""
    config = ModelConfig(512, 4, 96, 4, 2, 32, 160, 64)
    values = jax.jit(blueprint(config).init)(jax.random.key(0))
    truncated = 0.8796  # standard deviation of a normal distribution cut at two of its own
    blocks = values["blocks"]
    residual = 1 / math.sqrt(2 * 4)
    for kernel, expected in [
        (values["embedding"], 1.0),  # 0.02 where it is the head too
        (values["head"], 0.02),
        (blocks["attention"]["query"]["kernel"], truncated / math.sqrt(96)),
        (blocks["attention"]["out"]["kernel"], truncated / math.sqrt(128) * residual),
        (blocks["mlp"]["gate"]["kernel"], truncated / math.sqrt(96)),
        (blocks["mlp"]["down"]["kernel"], truncated / math.sqrt(160) * residual),
    ]:
        assert_allclose(np.std(kernel), expected, rtol=0.03)
        assert abs(np.mean(kernel)) < 0.05 * expected
    first, second = blocks["mlp"]["up"]["kernel"][:2]
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.05, "layers start apart"
