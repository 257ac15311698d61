"""Logits and gradients against Hugging Face's implementations: random weights, odd shapes, float32.

The weights, and the gradients in their place, go the way of any checkpoint: `transformers` writes them, and
`export.read` reads them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import CASES, LAYERS, VOCAB, make
from numpy.testing import assert_allclose
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from export.read import read_config, read_params
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint

BATCH, LENGTH = 2, 23
Z_LOSS = 0.3  # of the router, which no `config.json` has


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Our config, and logits, weights and gradients of the training objective, the latter two as ours."""

    @functools.cache
    def compute(name: str):
        folder, model = tmp_path_factory.mktemp(name), make(name)
        model.save_pretrained(folder / "weights")
        config = read_config(folder / "weights")
        logits = objective(model, config)
        for parameter in model.parameters():
            parameter.data = parameter.grad
        model.save_pretrained(folder / "gradients")
        shapes = blueprint(config).shapes
        return config, logits, *(read_params(folder / kind, shapes) for kind in ("weights", "gradients"))

    return compute


def objective(model, config: ModelConfig) -> np.ndarray:
    """The logits; the gradients of the loss are left in the model."""
    batch = torch.tensor(tokens())
    extra = {"output_router_logits": True} if config.moe else {}
    out = model(batch, **extra)
    logits = out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
    if moe := config.moe:
        for layer in out.router_logits:
            balance = load_balancing_loss_func((layer,), moe.num_experts, moe.top_k)
            z_loss = torch.logsumexp(layer, -1).square().mean()
            loss = loss + (moe.balance_loss * balance + Z_LOSS * z_loss) / LAYERS
    loss.backward()
    return logits.detach().numpy()


def forward(config: ModelConfig, params) -> tuple[jax.Array, jax.Array | float]:
    """Logits, and what the router's losses add to the objective."""
    batch = jnp.asarray(tokens(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), batch.shape)
    model = blueprint(config).bind(params)
    out, moe, added = model(batch, positions, jnp.ones_like(batch)), config.moe, 0.0
    if moe is not None:
        losses = out.routing
        added = moe.balance_loss * losses.balance_loss + Z_LOSS * losses.router_z_loss
    return model.logits(out.hidden), added


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_hugging_faces(reference, name):
    config, logits, params, gradients = reference(name)
    assert config == CASES[name][0]

    def loss(params):
        ours, added = forward(config, params)
        log_probabilities = jax.nn.log_softmax(ours[:, :-1])
        picked = jnp.take_along_axis(log_probabilities, jnp.asarray(tokens())[:, 1:, None], axis=-1)
        return added - picked.mean(), ours

    got, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.std(logits) > 0.5, "logits near zero would agree whatever the model"
    assert_allclose(ours, logits, rtol=0, atol=1e-5)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(gradients), strict=True
    ):
        assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.parametrize("window", [4, 6])
def test_a_window_off_by_one_is_seen(reference, window):
    config, logits, params, _ = reference("mistral-window")
    ours, _ = jax.jit(functools.partial(forward, dataclasses.replace(config, window=window)))(params)
    seen_alike = min(window, 5)
    assert_allclose(ours[:, :seen_alike], logits[:, :seen_alike], atol=1e-5)
    assert np.abs(ours[:, seen_alike] - logits[:, seen_alike]).max() > 1e-3
