"""The dual encoder: published sizes, what sees what, dropped patches, meshes, and how it is computed."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from runs import ROOT

from clip.config import Experiment
from clip.model.config import CLIPConfig, ImageConfig, TextConfig
from clip.model.model import blueprint, check_mesh, pixels
from clip.model.vision import keep
from core.config import load, parse, to_dict
from core.errors import UserError
from core.mesh import make_mesh, shardings, spec
from core.options import MeshConfig
from llm.model.transformer import Compute

IMAGE = ImageConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, size=12, patch_size=4)
TEXT = TextConfig(embed_dim=8, num_layers=2, num_heads=2, mlp_dim=12, vocab_size=32, length=6)
CLIP = CLIPConfig(image=IMAGE, text=TEXT, embed_dim=16)
SIGLIP = CLIPConfig(
    image=dataclasses.replace(IMAGE, pool="attention", activation="gelu_tanh"),
    text=dataclasses.replace(TEXT, pool="last", causal=False, activation="gelu_tanh"),
    embed_dim=16,
    logit_bias=True,
)
BOTH = pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
COUNTS = {
    "vit-b-32": 151_277_313,
    "vit-b-16": 149_620_737,
    "vit-l-14": 427_616_513,
    "siglip-b-16": 203_155_970,
}
BATCH = 8


@pytest.mark.parametrize("name", COUNTS)
def test_published_shapes_have_the_published_parameters(name):
    experiment = load(Experiment, ROOT / f"configs/clip/{name}.yaml")
    assert blueprint(experiment.model).count == COUNTS[name]
    assert experiment.run.name == name
    check_mesh(experiment.model, make_mesh(MeshConfig(fsdp=4, tensor=2)))


@functools.cache
def params(config: CLIPConfig):
    """Initial values, moved a little, so that biases count."""
    values = jax.jit(blueprint(config).init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32), values)


@functools.cache
def batch():
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.integers(0, 256, (BATCH, 12, 12, 3)), jnp.uint8)
    ends = jnp.asarray(rng.integers(1, 6, BATCH), jnp.int32)
    tokens = jnp.where(jnp.arange(6) < ends[:, None], jnp.asarray(rng.integers(0, 31, (BATCH, 6))), 31)
    return images, tokens, ends


@functools.cache
def forward(config: CLIPConfig, compute: Compute = Compute()):  # noqa: B008
    model = blueprint(config, compute)

    @jax.jit
    def run(params, images, tokens, ends):
        bound = model.bind(params)
        return bound.encode_image(pixels(images, config.image)), bound.encode_text(tokens, ends)

    return run


def loss_and_gradient(config: CLIPConfig, compute: Compute = Compute(), key=None):  # noqa: B008
    model = blueprint(config, compute)

    def loss(params, images, tokens, ends):
        bound = model.bind(params)
        image = bound.encode_image(pixels(images, config.image), key=key)
        logits = bound.logits(image, bound.encode_text(tokens, ends))
        return -jnp.diagonal(jax.nn.log_softmax(logits)).mean() + (logits**2).mean() / 100

    return jax.value_and_grad(loss)


def assert_near(got, want, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        # A bias of all keys changes no softmax: what stands there is rounding of the other gradients.
        least = 0.1 if "['key']['bias']" in name else 1e-2
        scale = max(np.abs(np.asarray(b)).max(), least)
        assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


def test_embeddings_are_of_unit_length_and_near_in_bfloat16():
    exact, rounded = (
        forward(CLIP, Compute(dtype=dtype))(params(CLIP), *batch()) for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert one.shape == (BATCH, 16) and one.dtype == other.dtype == jnp.float32
        for rows in (one, other):
            assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, atol=1e-5)
        assert 0 < np.abs(np.asarray(one - other)).max() < 0.05


def test_a_caption_is_read_at_its_end_and_no_further():
    images, tokens, ends = batch()
    run = forward(CLIP)
    _, text = run(params(CLIP), images, tokens, ends)
    after = jnp.where(jnp.arange(6) > ends[:, None], 3, tokens)
    assert_array_equal(run(params(CLIP), images, after, ends)[1], text)
    before = jnp.where(jnp.arange(6) == ends[:, None] - 1, (tokens + 1) % 31, tokens)
    assert (np.abs(np.asarray(run(params(CLIP), images, before, ends)[1] - text)).max(-1) > 1e-4).all()


def test_siglip_reads_the_whole_row():
    images, tokens, ends = batch()
    run = forward(SIGLIP)
    _, text = run(params(SIGLIP), images, tokens, ends)
    for place in (0, 5):
        changed = tokens.at[:, place].set((tokens[:, place] + 1) % 32)
        other = run(params(SIGLIP), images, changed, ends)[1]
        assert (np.abs(np.asarray(other - text)).max(-1) > 1e-5).all()


@BOTH
def test_every_patch_is_seen(config):
    images, _, _ = batch()

    def first(x):
        return blueprint(config).bind(params(config)).encode_image(x)[:, 0].sum()

    seen = np.abs(np.asarray(jax.jit(jax.grad(first))(pixels(images, config.image)))).sum(-1)
    assert (seen.reshape(BATCH, 3, 4, 3, 4).sum((2, 4)) > 1e-6).all()


def test_dropped_patches_leave_no_trace_and_the_class_token_stays():
    config = dataclasses.replace(CLIP, image=dataclasses.replace(IMAGE, patch_dropout=0.5))

    def first(params, x):
        return blueprint(config).bind(params).encode_image(x, key=jax.random.key(3))[:, 0].sum()

    values, x = jax.jit(jax.grad(first, (0, 1)))(params(config), pixels(batch()[0], config.image))
    seen = np.abs(np.asarray(x)).sum(-1).reshape(BATCH, 3, 4, 3, 4).sum((2, 4)) > 0
    assert_array_equal(seen.reshape(BATCH, -1).sum(-1), 4)  # half of 9, rounded down
    assert np.abs(np.asarray(values["image"]["token"])).max() > 0


def test_the_patches_that_are_kept_differ_by_image_and_key():
    config = dataclasses.replace(IMAGE, patch_dropout=0.5)
    kept = np.asarray(keep(jax.random.key(0), 64, config))
    assert kept.shape == (64, 4) and all(len(set(row)) == 4 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 20
    assert not np.array_equal(kept, np.asarray(keep(jax.random.key(1), 64, config)))
    shares = np.bincount(kept.ravel(), minlength=9) / 64
    assert_allclose(shares, 4 / 9, atol=0.25)


@pytest.mark.parametrize(
    "config", [CLIP, pytest.param(SIGLIP, marks=pytest.mark.slow)], ids=["clip", "siglip"]
)
def test_sharded_equals_unsharded(config):
    """6 of 9 patches, with a class token or without, and 6 tokens of text: 7 don't divide over `tensor`."""
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, patch_dropout=0.3))
    function = loss_and_gradient(config, key=jax.random.key(5))
    want = jax.jit(function)(params(config), *batch())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = blueprint(config)
    places = shardings(mesh, model.axes)
    rows = jax.sharding.NamedSharding(mesh, spec(["act_batch"]))
    with jax.set_mesh(mesh):
        run = jax.jit(function, in_shardings=(places, rows, rows, rows))
        got = run(jax.device_put(params(config), places), *batch())
    assert_near(got, want, 1e-5)


def test_the_same_bits_on_every_mesh():
    model, mesh = blueprint(CLIP), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    key = jax.random.key(0)
    drawn = jax.jit(model.init, out_shardings=shardings(mesh, model.axes))(key)
    for one, other in zip(*map(jax.tree.leaves, (drawn, jax.jit(model.init)(key))), strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [{"remat": "dots"}, {"remat": "full", "scan_layers": False, "attention": "blockwise"}],
    ids=str,
)
def test_how_it_is_computed_does_not_change_what(change):
    got = jax.jit(loss_and_gradient(CLIP, Compute(**change)))(params(CLIP), *batch())
    assert_near(got, reference_gradient(), 1e-5)


@functools.cache
def reference_gradient():
    return jax.jit(loss_and_gradient(CLIP))(params(CLIP), *batch())


def test_a_backend_that_masks_can_not_see_an_image():
    for backend in ("pallas", "ring"):
        with pytest.raises(ValueError, match=f"{backend} attention is causal only"):
            forward(CLIP, Compute(attention=backend))(params(CLIP), *batch())


def test_it_starts_as_openais_does():
    wide = dataclasses.replace(
        CLIP,
        image=dataclasses.replace(IMAGE, embed_dim=128, mlp_dim=512, num_layers=3),
        text=dataclasses.replace(TEXT, embed_dim=64, mlp_dim=256, vocab_size=200),
    )
    drawn = jax.jit(blueprint(wide).init)(jax.random.key(0))
    for side, width, layers in (("image", 128, 3), ("text", 64, 2)):
        blocks = drawn[side]["blocks"]
        residual = width**-0.5 * (2 * layers) ** -0.5
        for kernel, deviation in [
            (blocks["attention"]["query"]["kernel"], width**-0.5),
            (blocks["attention"]["out"]["kernel"], residual),
            (blocks["mlp"]["up"]["kernel"], (2 * width) ** -0.5),
            (blocks["mlp"]["down"]["kernel"], residual),
        ]:
            assert_allclose(np.std(kernel), deviation, rtol=0.03)
            assert not np.array_equal(kernel[0], kernel[1])
    assert_allclose(np.std(drawn["text"]["embedding"]), 0.02, rtol=0.03)
    assert_allclose(drawn["logit_scale"], math.log(1 / 0.07), rtol=1e-6)
    assert "logit_bias" not in drawn
    sigmoid = jax.jit(blueprint(SIGLIP).init)(jax.random.key(0))
    assert_allclose(np.exp(sigmoid["logit_scale"]), 10, rtol=1e-6)
    assert sigmoid["logit_bias"] == -10


@BOTH
def test_what_is_decayed(config):
    """As in OpenCLIP: whatever has two axes or more."""
    model = blueprint(config)
    for (path, decayed), shape in zip(
        jax.tree_util.tree_leaves_with_path(model.decay), jax.tree.leaves(model.shapes), strict=True
    ):
        name = jax.tree_util.keystr(path)
        stacked = "blocks" in name
        vector = "'bias'" in name or "'scale'" in name or len(shape.shape) - stacked < 2
        assert decayed == (not vector), name


def test_pixels_are_normalized():
    images = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    got = pixels(images, dataclasses.replace(IMAGE, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0)))
    assert_allclose(got[0, 0, 0], [-1, (128 / 255 - 0.25) / 0.5, 0.5], atol=1e-6)


def test_other_sizes_are_refused():
    model = blueprint(CLIP).bind(params(CLIP))
    with pytest.raises(ValueError, match="images of 16 x 12 pixels, and the model takes 12"):
        model.encode_image(jnp.zeros((1, 16, 12, 3)))
    with pytest.raises(ValueError, match="captions of 7 tokens, and the model takes 6"):
        model.encode_text(jnp.zeros((1, 7), jnp.int32), jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"num_heads": 3}}, r"embed_dim \(16\) is not a multiple of num_heads \(3\)"),
        ({"image": {"patch_size": 5}}, r"size \(12\) is not a multiple of patch_size \(5\)"),
        ({"image": {"std": [1, 0, 1]}}, "must be positive"),
        ({"image": {"patch_dropout": 1.0}}, "image.patch_dropout"),
        ({"image": {"pool": "attention"}, "embed_dim": 12}, r"model.embed_dim \(12\) must be"),
        ({"text": {"activation": "swiglu"}}, "text.activation"),
        ({"image": {"colours": 3}}, "colours"),
    ],
)
def test_impossible_shapes_are_named(change, message):
    tree = to_dict(CLIP)
    for key, value in change.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        parse(CLIPConfig, tree)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"context": 2, "data": 4}, "mesh.context is 2"),
        ({"tensor": 4, "data": 2}, r"model.image.num_heads \(2\) does not divide over mesh.tensor=4"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(UserError, match=message):
        check_mesh(CLIP, make_mesh(MeshConfig(**axes)))
