"""A split measured in batches, on a mesh, against the towers called once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip.data.captions import encode_captions
from clip.data.config import DataConfig
from clip.data.scenes import Scenes
from clip.eval.embed import make_embed
from clip.eval.heldout import make_measure
from clip.eval.zero_shot import classify
from clip.loss import sigmoid_loss
from clip.model.config import CLIPConfig
from clip.model.model import blueprint, pixels
from core.config import parse
from core.mesh import make_mesh, shardings
from core.options import MeshConfig
from llm.tokenizer import Tokenizer, save, train_bpe

SHAPE = {"num_layers": 1, "num_heads": 2, "embed_dim": 8, "mlp_dim": 16}
CONFIG = parse(
    CLIPConfig,
    {
        "embed_dim": 8,
        "image": {**SHAPE, "size": 32, "patch_size": 8},
        "text": {**SHAPE, "vocab_size": 300, "length": 12},
        "logit_bias": True,
    },
)
SPLIT = Scenes(0, heldout=True)
MESHES = {"one": {"data": 1}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train_bpe([SPLIT.captions(i)[0] for i in range(100)], 280, "llama3"), folder / "bpe")
    return Tokenizer.load(folder / "bpe")


@pytest.fixture(scope="module")
def model():
    drawn = blueprint(CONFIG)
    return drawn, drawn.init(jax.random.key(0))


def mesh_of(sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod([*sizes.values()]))])


@functools.partial(jax.jit, static_argnums=0)
def whole_images(drawn, params, images):
    return drawn.bind(params).encode_image(pixels(images, CONFIG.image))


@functools.partial(jax.jit, static_argnums=0)
def whole_texts(drawn, params, tokens, ends):
    return drawn.bind(params).encode_text(tokens, ends)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_embeddings_are_those_of_one_call(model, tokenizer, sizes):
    drawn, params = model
    indices, texts = [5, 3, 8, 3, 9, 100, 7], ["a red seven", "one blue two", "white zero", "an eight", ""]
    mesh = mesh_of(sizes)
    embed = make_embed(drawn, CONFIG, DataConfig(batch_size=3), tokenizer, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, drawn.axes))
        of_images, of_texts = embed.images(placed, SPLIT, indices), embed.texts(placed, texts)
        few = embed.images(placed, SPLIT, indices[:2])
    images = jnp.asarray(np.stack([np.asarray(SPLIT[i].image) for i in indices]))
    tokens, ends = map(jnp.asarray, encode_captions(tokenizer, texts, 12))
    np.testing.assert_allclose(of_images, whole_images(drawn, params, images), atol=1e-5)
    np.testing.assert_allclose(of_texts, whole_texts(drawn, params, tokens, ends), atol=1e-5)
    np.testing.assert_allclose(few, of_images[:2], atol=1e-6)


@pytest.fixture(scope="module", params=MESHES.values(), ids=MESHES)
def measured(model, tokenizer, request):
    drawn, params = model
    mesh = mesh_of(request.param)
    measure = make_measure(drawn, CONFIG, DataConfig(batch_size=16), tokenizer, SPLIT, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, drawn.axes))
        others = jax.tree.map(lambda x: 1.5 * x, placed)
        first = measure(placed, 40)
        count = []
        jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: count.append(name))
        measure(others, 24)  # nothing is compiled anew for other parameters or another number of examples
    assert not [name for name in count if "backend_compile" in name]
    return params, first


def test_a_measure_is_of_examples_that_are_always_the_same(measured):
    _, first = measured
    assert len(set(first.indices.tolist())) == 40
    labels = [SPLIT.label(i) for i in first.indices.tolist()]
    assert 5 < labels.count(None) < 35
    assert [None if label < 0 else label for label in first.labels.tolist()] == labels


def test_the_loss_is_that_of_whole_batches(measured):
    params, first = measured
    texts = np.stack(
        [first.texts[first.pool.captions.index(SPLIT.captions(i)[0])] for i in first.indices.tolist()]
    )
    scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
    losses = [
        sigmoid_loss(
            jnp.asarray(first.images[at]), jnp.asarray(texts[at]), scale, bias, negatives="dense"
        ).loss
        for at in (slice(0, 16), slice(16, 32))
    ]
    assert first.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_a_classification_among_some_classes_is_of_their_images(measured):
    _, first = measured
    labelled = first.labels[first.labelled]
    some = sorted(set(labelled.tolist()))[:3]
    result = first.classification(some)
    assert result.num_classes == 3
    assert len(result.labels) == np.isin(labelled, some).sum()
    own = first.labelled[labelled == some[1]]
    alone = classify(first.images[own], first.classes[some], np.ones(len(own), int))
    assert result.per_class[1] == alone.accuracy


def test_figures_have_the_names_that_others_look_for(measured):
    figures = measured[1].figures()
    ways = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert {*figures} == {"heldout_loss", "zero_shot_accuracy", "zero_shot_top5", *ways}
