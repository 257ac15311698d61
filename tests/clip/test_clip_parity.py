"""Embeddings, logits and gradients against Hugging Face's CLIP and SigLIP: random weights, odd shapes.

The weights, and the gradients in their place, go the way of any checkpoint: `transformers` writes them, and
`export.read` reads them.
"""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from dual_models import CASES, END, VOCAB, make
from numpy.testing import assert_allclose

from clip.model.model import blueprint
from export.read import read_config, read_params

BATCH = 3


def batch(config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, tokens that end at different places, and those places."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(BATCH, config.image.size, config.image.size, 3)).astype(np.float32)
    tokens = rng.integers(END + 1, VOCAB, (BATCH, config.text.length))
    ends = np.array([5, 12, 1])
    for row, end in zip(tokens, ends, strict=True):
        row[end:] = END
    return pixels, tokens, ends


def run_theirs(model, pixels, tokens):
    return model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)), input_ids=torch.tensor(tokens))


def cross_entropy(logits):
    """Of each image's caption among all, and of each caption's image."""
    return -sum(jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Our config, weights and gradients of theirs as ours, and their outputs."""

    @functools.cache
    def compute(name: str):
        folder, model = tmp_path_factory.mktemp(name), make(name)
        model.save_pretrained(folder / "weights")
        config = read_config(folder / "weights")
        pixels, tokens, _ = batch(config)
        out = run_theirs(model, pixels, tokens)
        target = torch.arange(BATCH)
        entropy = torch.nn.functional.cross_entropy
        (entropy(out.logits_per_image, target) + entropy(out.logits_per_text, target)).backward()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        model.save_pretrained(folder / "gradients")
        shapes = blueprint(config).shapes
        parts = (out.image_embeds, out.text_embeds, out.logits_per_image)
        read = (read_params(folder / kind, shapes) for kind in ("weights", "gradients"))
        return config, *read, [part.detach().numpy() for part in parts]

    return compute


@pytest.mark.parametrize("name", CASES)
def test_embeddings_logits_and_gradients_are_hugging_faces(reference, name):
    config, params, gradients, theirs = reference(name)
    pixels, tokens, ends = map(jnp.asarray, batch(config))
    model = blueprint(config)

    def loss(params):
        bound = model.bind(params)
        image, text = bound.encode_image(pixels), bound.encode_text(tokens, ends)
        logits = bound.logits(image, text)
        return cross_entropy(logits), (image, text, logits)

    got, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.std(theirs[-1]) > 0.1, "logits alike would agree whatever the model"
    for mine, their in zip(ours, theirs, strict=True):
        assert_allclose(mine, their, rtol=0, atol=1e-5)
    for (path, mine), their in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(gradients), strict=True
    ):
        where = str(path)
        # A bias of every logit and of every key changes no cross entropy: rounding is all there is of those.
        quiet = "logit_bias" in where or ("'key'" in where and "'bias'" in where)
        assert np.abs(their).max() > 1e-4 or quiet, where
        assert_allclose(mine, their, rtol=0, atol=2e-5 * max(np.abs(their).max(), 0.01), err_msg=where)


def test_the_end_of_old_checkpoints(reference):
    """Those say 2, and mean the largest id of a row: where it first stands is what `ends` says of it."""
    config, params, _, _ = reference("clip-quick")
    pixels, tokens, ends = batch(config)
    tokens[tokens == END] = VOCAB - 1
    theirs = copy.deepcopy(CASES["clip-quick"][1])
    theirs.text_config.eos_token_id = 2
    out = run_theirs(make("clip-quick", theirs), pixels, tokens)
    encode = jax.jit(lambda params, *text: blueprint(config).bind(params).encode_text(*text))
    text = encode(params, tokens, ends)
    assert_allclose(text, out.text_embeds.detach().numpy(), atol=1e-5)
