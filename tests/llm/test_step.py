"""The training step through production code: meshes, accumulation, optimizers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from core.errors import UserError
from core.mesh import local_rows, make_mesh, shardings
from core.optim import learning_rate, make_optimizer
from core.options import MeshConfig, OptimizerConfig
from core.state import init_state
from llm.config import TrainConfig
from llm.data.loader import Batch
from llm.model.config import ModelConfig
from llm.model.transformer import Compute, blueprint
from llm.step import jit_train_step, put_batch

MODEL = ModelConfig(
    vocab_size=128,
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=64,
    max_length=32,
)
TRAIN = TrainConfig(steps=5, z_loss=1e-4, loss_chunk=16)
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, schedule="constant", clip_norm=None)
ROWS, LENGTH = 32, 32


def packed_batch(seed: int) -> Batch:
    """Rows of several documents each, with a share of tokens that don't count: ragged."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    begins = rng.random((ROWS, LENGTH)) < 0.1
    segments = (np.cumsum(begins, 1) + 1).astype(np.int32)
    place = np.arange(LENGTH)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), 1)
    share = rng.random((ROWS, 1))  # some rows have few weighted tokens, some many
    weights = (rng.random((ROWS, LENGTH)) < share).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions.astype(np.int32), weights)


def run(
    options: MeshConfig,
    train: TrainConfig = TRAIN,
    optimizer: OptimizerConfig = SGD,
    devices=None,
    config: ModelConfig = MODEL,
):
    """Five steps; metrics by step, and the parameters at the end."""
    attention = "ring" if options.context > 1 else "reference"
    model = blueprint(config, Compute(train.dtype, attention, train.remat, experts=train.experts))
    mesh = make_mesh(options, devices)
    tx = make_optimizer(optimizer, train.steps, model.decay, model.axes)
    with jax.set_mesh(mesh):
        state = init_state(model, train, tx, mesh, seed=0)
        step = jit_train_step(model, train, tx, mesh)
        history = []
        for i in range(train.steps):
            state, metrics = step(state, put_batch(packed_batch(i), mesh))
            history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.tree.map(np.asarray, state.params)


@functools.cache
def one_device():
    return run(MeshConfig(data=1), devices=jax.devices()[:1])


def assert_same_course(got, expected):
    for ours, theirs in zip(got[0], expected[0], strict=True):
        assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


LATTICE = [  # each axis at least once
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "context": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
]
REST = [
    {"fsdp": 8},
    {"context": 8},
    {"data": 2, "fsdp": 4},
    {"data": 4, "tensor": 2},
    {"data": 2, "tensor": 4},
    {"fsdp": 2, "context": 4},
    {"tensor": 4, "context": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "tensor": 2, "context": 2},
]


@pytest.mark.parametrize(
    "sizes", [*LATTICE, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in REST)], ids=str
)
def test_sharded_equals_unsharded(sizes):
    assert_same_course(run(MeshConfig(**{"data": 1} | sizes)), one_device())


def test_all_at_once_on_a_mesh():
    """Three axes, ring attention, a recomputed forward pass and microbatches of ragged token counts."""
    train = dataclasses.replace(TRAIN, accumulation=4, remat="full")
    assert_same_course(run(MeshConfig(data=1, fsdp=2, tensor=2, context=2), train), one_device())


def test_muon_on_a_mesh_takes_the_same_course():
    muon = OptimizerConfig(name="muon", learning_rate=0.02, schedule="constant", clip_norm=None)
    alone = run(MeshConfig(data=1), optimizer=muon, devices=jax.devices()[:1])
    sharded = run(MeshConfig(data=2, fsdp=2, tensor=2), optimizer=muon)
    for ours, theirs in zip(sharded[0], alone[0], strict=True):
        assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=4)])
def test_accumulation_is_exact_on_ragged_token_counts(mesh):
    train = dataclasses.replace(TRAIN, accumulation=4)
    assert_same_course(run(mesh, train, devices=jax.devices()[:4]), one_device())


def test_an_overflow_halves_the_scale_skips_the_update_and_training_goes_on():
    train = dataclasses.replace(TRAIN, dtype="float16", average=0.9)
    model, mesh = blueprint(MODEL, Compute("float16")), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01), train.steps, model.decay, model.axes)
    with jax.set_mesh(mesh):
        step = jit_train_step(model, train, tx, mesh)
        state = init_state(model, train, tx, mesh, seed=0)
        state = state._replace(scale=state.scale._replace(value=state.scale.value * 2.0**40))
        before = jax.tree.map(np.asarray, state)
        state, metrics = step(state, put_batch(packed_batch(0), mesh))
        assert not np.isfinite(metrics["grad_norm"]) and metrics["loss_scale"] == 2.0**56
        after = jax.tree.map(np.asarray, state)
        assert after.scale.value == 2.0**55 and after.step == 1
        jax.tree.map(
            np.testing.assert_array_equal,
            (after.params, after.opt_state, after.average),
            (before.params, before.opt_state, before.average),
        )
        state = state._replace(scale=before.scale._replace(value=jnp.float32(2.0**16)))
        losses = []
        for _ in range(4):
            state, metrics = step(state, put_batch(packed_batch(0), mesh))
            losses.append(float(metrics["loss"]))
    assert np.isfinite(metrics["grad_norm"]) and losses[-1] < losses[0]
    assert state.scale.steps == 4 and state.scale.value == 2.0**16


def test_float16_takes_float32s_course():
    half = run(MeshConfig(data=1), dataclasses.replace(TRAIN, dtype="float16"), devices=jax.devices()[:1])
    for ours, theirs in zip(half[0], one_device()[0], strict=True):
        assert_allclose(ours["loss"], theirs["loss"], rtol=2e-3)
        assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=2e-2)
        assert ours["loss_scale"] == 2.0**16


def test_the_average_is_that_of_the_steps():
    """By the recurrence, from the parameters after each step; its decay is at most (1 + n) / (10 + n)."""
    train, mesh = dataclasses.replace(TRAIN, average=0.2), make_mesh(MeshConfig(data=8))
    model = blueprint(MODEL)
    tx = make_optimizer(SGD, train.steps, model.decay, model.axes)
    with jax.set_mesh(mesh):
        step = jit_train_step(model, train, tx, mesh)
        state = init_state(model, train, tx, mesh, seed=0)
        expected = jax.tree.map(np.asarray, state.params)
        for i, keep in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
            state, _ = step(state, put_batch(packed_batch(i), mesh))
            params = jax.tree.map(np.asarray, state.params)
            expected = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, expected, params)  # noqa: B023
    assert state.model is state.average
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-5, atol=1e-6), state.average, expected)


def test_every_parameter_moves():
    before = jax.tree.map(np.asarray, jax.jit(blueprint(MODEL).init)(jax.random.key(0)))
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.abs(a - b).max(), before, one_device()[1])
    ):
        assert moved > 0, path


def test_adamw_is_torchs():
    """Against torch.optim.AdamW: decay only where a parameter says so, clipping, the schedule."""
    torch = pytest.importorskip("torch")
    options = OptimizerConfig(learning_rate=0.05, warmup_steps=2, weight_decay=0.3, clip_norm=0.5)
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    optimizer = make_optimizer(options, 10, {"w": True, "b": False}, {"w": (), "b": ()})
    params, state = jax.tree.map(jnp.asarray, start), optimizer.transform.init(start)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    adamw = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.3}, {"params": [theirs["b"]], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    from core.optim import clip

    for step in range(10):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
        for name, value in grads.items():
            theirs[name].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        for group in adamw.param_groups:
            group["lr"] = float(optimizer.learning_rate(step))
        adamw.step()
        norm = optax.tree.norm(grads)
        updates, state = optimizer.transform.update(clip(grads, norm, 0.5), state, params)
        params = optax.apply_updates(params, updates)
    for name in start:
        assert_allclose(params[name], theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_for_matrices_and_adam_for_the_rest():
    """Against torch.optim.Muon, which rounds to bfloat16 and weighs the newest gradient a bit otherwise."""
    torch = pytest.importorskip("torch")
    options = OptimizerConfig(name="muon", learning_rate=0.1, schedule="constant", weight_decay=0.0)
    shapes = {"up": (2, 16, 48), "out": (2, 4, 12, 16), "norm": (2, 16), "embedding": (32, 16)}
    axes = {
        "up": ("layers", "embed", "mlp"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "norm": ("layers", "embed"),
        "embedding": ("vocab", "embed"),
    }
    decay = dict.fromkeys(shapes, True)
    muon, adamw = (
        make_optimizer(dataclasses.replace(options, name=name), 10, decay, axes).transform
        for name in ("muon", "adamw")
    )
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state, other = muon.init(params), adamw.init(params)
    theirs = [torch.nn.Parameter(torch.zeros(16, 48)) for _ in range(4)]  # up, up, out, out of two layers
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rng = np.random.default_rng(0)
    for _ in range(4):
        grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        rows = [*grads["up"], *(out.reshape(48, 16).T for out in grads["out"])]
        for parameter, row in zip(theirs, rows, strict=True):
            parameter.data.zero_()
            parameter.grad = torch.tensor(np.ascontiguousarray(row))
        peer.step()
        updates, state = muon.update(grads, state, params)
        expected, other = adamw.update(grads, other, params)
        for name in ("norm", "embedding"):
            assert_allclose(updates[name], expected[name], rtol=1e-6)
        ours = [*updates["up"], *(out.reshape(48, 16).T for out in updates["out"])]
        for mine, parameter in zip(ours, theirs, strict=True):
            him = parameter.detach().numpy()
            cosine = np.sum(mine * him) / np.linalg.norm(mine) / np.linalg.norm(him)
            assert cosine > 0.98
            assert_allclose(np.linalg.norm(mine), np.linalg.norm(him), rtol=0.1)


def test_rates_multiply_the_updates_of_the_parameters_they_name():
    params = {"blocks": {"mlp": jnp.ones(3), "norm": jnp.ones(3)}, "block": jnp.ones(3)}
    grads, decay = jax.tree.map(jnp.ones_like, params), jax.tree.map(lambda _: True, params)

    def update(rates):
        options = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1, rates=rates)
        transform = make_optimizer(options, 10, decay, decay).transform
        return transform.update(grads, transform.init(params), params)[0]

    # Adam's first update is the gradient's sign; weight decay keeps its own rate.
    expected = {"blocks": {"mlp": -0.5 * (6 + 0.1), "norm": -0.5 * (3 + 0.1)}, "block": -0.5 * (1 + 0.1)}
    got = update({"blocks": 3.0, "blocks.mlp": 2.0})
    jax.tree.map(lambda g, e: assert_allclose(g, np.full(3, e, np.float32), rtol=1e-5), got, expected)
    with pytest.raises(UserError, match=r"optimizer.rates.*'bloc'.*blocks\.mlp"):
        update({"bloc": 2.0})


def test_schedules():
    cosine = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 110)
    assert_allclose([cosine(0), cosine(9), cosine(10), cosine(60), cosine(110)], [0.1, 1, 1, 0.55, 0.1], 1e-6)
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", final_fraction=0.0)
    wsd = learning_rate(options, 100)  # decays over the last 20 steps
    assert_allclose([wsd(0), wsd(9), wsd(50), wsd(80), wsd(90), wsd(100)], [0.1, 1, 1, 1, 0.5, 0], atol=1e-6)
    short = learning_rate(dataclasses.replace(options, warmup_steps=1), 10)
    assert_allclose(short(0), 1.0)
    steep = learning_rate(dataclasses.replace(options, warmup_steps=60, decay_fraction=0.5), 100)
    assert_allclose([steep(59), steep(60), steep(80), steep(100)], [1, 1, 0.5, 0], atol=1e-6)


def test_rows_of_a_process_cover_the_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert local_rows(mesh, ROWS) == slice(0, ROWS)
    placed = put_batch(packed_batch(0), mesh)
    assert placed.tokens.sharding == shardings(mesh, ("act_batch", "act_seq"))
    np.testing.assert_array_equal(placed.tokens, packed_batch(0).tokens)


def test_a_mesh_that_does_not_match_is_named():
    with pytest.raises(UserError, match=r"mesh\.data=3.*8 cpu device"):
        make_mesh(MeshConfig(data=3))
