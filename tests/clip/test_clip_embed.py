"""Embeddings in batches, on a mesh, against the towers called once."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip.eval.embed import make_embed
from clip.model.config import CLIPConfig
from clip.model.model import blueprint, pixels
from core.config import parse
from core.mesh import make_mesh
from core.options import MeshConfig

SHAPE = {"num_layers": 1, "num_heads": 2, "embed_dim": 8, "mlp_dim": 16}
CONFIG = parse(
    CLIPConfig,
    {
        "embed_dim": 8,
        "image": {**SHAPE, "size": 8, "patch_size": 4},
        "text": {**SHAPE, "vocab_size": 20, "length": 5},
    },
)


@pytest.fixture(scope="module")
def model():
    drawn = blueprint(CONFIG)
    return drawn, drawn.init(jax.random.key(0))


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "mesh"])
def test_embeddings_are_those_of_one_call(model, sizes):
    drawn, params = model
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 8, 8, 3), np.uint8)
    tokens, ends = rng.integers(0, 20, (9, 5), np.int32), rng.integers(1, 5, 9, np.int32)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod([*sizes.values()])])
    reads: collections.Counter = collections.Counter()

    def read(number):
        reads[number] += 1
        return images[number]

    embed = make_embed(drawn, CONFIG, mesh, batch_size=3)
    with jax.set_mesh(mesh):
        of_images, of_texts = embed.images(params, read, 11), embed.texts(params, tokens, ends)
        few = embed.images(params, read, 2)
    bound = drawn.bind(params)
    np.testing.assert_allclose(
        of_images, bound.encode_image(pixels(jnp.asarray(images), CONFIG.image)), atol=1e-5
    )
    np.testing.assert_allclose(of_texts, bound.encode_text(tokens, ends), atol=1e-5)
    np.testing.assert_allclose(few, of_images[:2], atol=1e-6)
    filling = 3 if sizes == {"data": 1} else 4
    assert reads.total() == 13
    assert filling
