"""The gradient of a contrastive step: over devices, with accumulation, and the bound on the scale."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from programs import largest_array

from clip.config import TrainConfig
from clip.data.batches import Batch
from clip.gradients import clamp, gradients
from clip.model.config import CLIPConfig, ImageConfig, TextConfig
from clip.model.model import blueprint, pixels
from core.mesh import make_mesh, shardings
from core.optim import make_optimizer
from core.options import MeshConfig, OptimizerConfig
from core.state import first_step, make_step

ROWS, LENGTH, VOCAB = 16, 6, 40
TOWER = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "activation": "quick_gelu"}
MODEL = CLIPConfig(
    embed_dim=12,
    image=ImageConfig(**TOWER, size=16, patch_size=4),
    text=TextConfig(**TOWER, vocab_size=VOCAB, length=LENGTH),
)
SIGMOID = dataclasses.replace(MODEL, logit_bias=True)
DROPPING = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, patch_dropout=0.5))
KEY = jax.random.key(7)
SGD = OptimizerConfig(name="sgd", learning_rate=1.0, schedule="constant", clip_norm=None)


@functools.cache
def params(config: CLIPConfig):
    """Random values large enough that images differ, with the logit scale and bias as they start."""
    rng, model = np.random.default_rng(0), blueprint(config)
    own = model.init(jax.random.key(0))
    values = jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.3, x.shape)), own)
    return values | {name: own[name] for name in ("logit_scale", "logit_bias") if name in own}


@functools.cache
def batch() -> Batch:
    rng = np.random.default_rng(1)
    ends = rng.integers(1, LENGTH, ROWS).astype(np.int32)
    tokens = rng.integers(0, VOCAB - 1, (ROWS, LENGTH)).astype(np.int32)
    tokens[np.arange(LENGTH) >= ends[:, None]] = VOCAB - 1
    images = rng.integers(0, 256, (ROWS, 16, 16, 3)).astype(np.uint8)
    return Batch(*map(jnp.asarray, (images, tokens, ends)))


def options(**changes) -> TrainConfig:
    return TrainConfig(steps=1, **changes)


def run(config: CLIPConfig, train: TrainConfig, sizes=None, scale: float = 1.0):
    """Gradients and metrics, jitted; on a mesh with parameters and rows divided as a step has them."""
    model = blueprint(config)
    function = functools.partial(gradients, model, train)
    args = params(config), batch(), KEY, jnp.float32(scale)
    if sizes is None:
        return jax.jit(function)(*args)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        whole = shardings(mesh, ())
        places = shardings(mesh, model.axes), shardings(mesh, ("act_batch",)), whole, whole
        return jax.jit(function, in_shardings=places)(*args)


def of_logits(logits, bias=None):
    """The loss, softmax without a bias and sigmoid with one, and the accuracy."""
    right = (logits.argmax(axis=1) == jnp.arange(ROWS)).mean()
    if bias is not None:
        return -jax.nn.log_sigmoid((2 * jnp.eye(ROWS) - 1) * (logits + bias)).sum() / ROWS, right
    sides = [jax.nn.log_softmax(side, 1) for side in (logits, logits.T)]
    return -(jnp.trace(sides[0]) + jnp.trace(sides[1])) / (2 * ROWS), right


@functools.cache
def plain(config: CLIPConfig, kind: str):
    """(loss, accuracy), gradient: by the formula over the whole batch at once, with JAX's derivative."""

    def loss(values):
        model, (images, tokens, ends) = blueprint(config).bind(values), batch()
        image, text = model.encode_image(pixels(images, config.image)), model.encode_text(tokens, ends)
        logits = jnp.exp(model.logit_scale[...]) * image @ text.T
        return of_logits(logits, model.logit_bias[...] if kind == "sigmoid" else None)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params(config))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def distance(tree, expected) -> float:
    """Relative, over all parameters."""
    mine, theirs = flat(tree), flat(expected)
    return float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))


def assert_same(got, expected, tolerance=1e-5):
    (grads, metrics), ((loss, accuracy), theirs) = got, expected
    assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert distance(grads, theirs) < tolerance
    for mine, their in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(mine - their) < 1e-4 * np.linalg.norm(their) + 1e-6  # of keys, a bias has none


@pytest.mark.parametrize(
    ("negatives", "sizes"),
    [
        ("dense", {"data": 8}),
        ("local", None),
        ("local", {"data": 2, "fsdp": 4}),
        ("local", {"data": 1, "tensor": 2}),
        ("chunked", None),
        ("chunked", {"data": 8}),
        ("chunked", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_one_device_and_many(negatives, sizes):
    got = run(MODEL, options(negatives=negatives, chunk=4), sizes)
    assert_same(got, plain(MODEL, "softmax"))
    assert_allclose(got[1]["logit_scale"], 1 / 0.07, rtol=1e-5)


@pytest.mark.parametrize(
    ("negatives", "sizes"), [("local", None), ("chunked", {"data": 2, "fsdp": 4})], ids=str
)
def test_sigmoid(negatives, sizes):
    got = run(SIGMOID, options(loss="sigmoid", negatives=negatives, chunk=4), sizes)
    assert_same(got, plain(SIGMOID, "sigmoid"))
    assert_allclose(got[1]["logit_scale"], 10, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "negatives", "sizes"),
    [("softmax", "local", {"data": 4, "tensor": 2}), ("sigmoid", "chunked", None)],
    ids=str,
)
def test_accumulation_keeps_all_negatives(kind, negatives, sizes):
    config = SIGMOID if kind == "sigmoid" else MODEL
    train = options(loss=kind, negatives=negatives, chunk=4, accumulation=4)
    assert_same(run(config, train, sizes), plain(config, kind))


def test_accumulation_of_microbatches_by_themselves_is_another_gradient():
    """What the test above is for: each microbatch's own loss, the usual accumulation, is far off."""
    model, train = blueprint(MODEL), options()
    function = jax.jit(functools.partial(gradients, model, train))
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch()) for i in range(4)]
    naive = [function(params(MODEL), part, KEY)[0] for part in parts]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *naive)
    assert distance(mean, plain(MODEL, "softmax")[1]) > 0.2


def test_accumulation_drops_the_same_patches_twice():
    """Against one derivative through vectors formed with the keys that the microbatches have."""
    model = blueprint(DROPPING)
    got, metrics = run(DROPPING, options(accumulation=4))

    def loss(values):
        bound, images = model.bind(values), []
        for i, key in enumerate(jax.random.split(KEY, 4)):
            images.append(bound.encode_image(pixels(batch().images[i::4], DROPPING.image), key=key))
        image = jnp.concatenate(images)
        order = np.concatenate([np.arange(ROWS)[i::4] for i in range(4)])
        text = bound.encode_text(batch().tokens[order], batch().ends[order])
        logits = jnp.exp(bound.logit_scale[...]) * image @ text.T
        return of_logits(logits)

    assert_same((got, metrics), jax.jit(jax.value_and_grad(loss, has_aux=True))(params(DROPPING)))
    assert distance(got, plain(MODEL, "softmax")[1]) > 0.1  # patches were dropped


def test_factor_on_the_loss_leaves_no_trace():
    got = run(MODEL, options(accumulation=2), scale=1024.0)
    assert_same(got, plain(MODEL, "softmax"))


def test_accumulation_keeps_one_microbatch_for_the_backward_pass():
    """Of the layers' maps of attention, as large as all else here together, four images' at one time."""
    model, values = blueprint(MODEL), params(MODEL)

    def largest(accumulation):
        step = jax.jit(functools.partial(gradients, model, options(accumulation=accumulation)))
        return largest_array(step.lower(values, batch(), KEY).compile().as_text())

    maps = TOWER["num_layers"] * TOWER["num_heads"] * MODEL.image.num_positions**2
    assert largest(1) >= ROWS * maps
    assert largest(4) < ROWS * maps / 2


@pytest.mark.parametrize(
    ("start", "push", "lands"), [(4.6, 1.0, math.log(100)), (0.01, -1.0, 0.0), (2.0, 0.5, 2.5)]
)
def test_the_scale_is_held_after_the_step(start, push, lands):
    """Plain descent at a rate of one: the parameter moves by the gradient, and then to the bound."""
    values = {"logit_scale": jnp.float32(start), "weight": jnp.ones(3)}
    axes, decay = {"logit_scale": (), "weight": ("norm",)}, {"logit_scale": False, "weight": False}
    optimizer = make_optimizer(SGD, 1, decay, axes)

    def pushed(values, batch, scale, step):
        return {"logit_scale": jnp.float32(-push), "weight": jnp.ones(3)}, {"loss": jnp.float32(0)}

    step = jax.jit(make_step(pushed, options(), optimizer, constrain=clamp))
    state, _ = step(first_step(options(), optimizer, values), None)
    assert_allclose(state.params["logit_scale"], jnp.float32(lands), rtol=1e-6)
    if lands != 2.5:
        assert state.params["logit_scale"] == jnp.float32(lands)
    assert_allclose(jnp.exp(state.params["logit_scale"]), math.exp(lands), rtol=1e-6)
    assert_allclose(state.params["weight"], 0, atol=1e-6)
