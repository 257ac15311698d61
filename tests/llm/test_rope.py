"""Rotary frequencies against Hugging Face's, and what rotations must keep."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from numpy.testing import assert_allclose
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.config import parse
from core.errors import UserError
from llm.model.config import ModelConfig, RopeScaling
from llm.model.rope import frequencies, rotate, rotations


def model(head_dim: int = 128, **changes) -> ModelConfig:
    shape = {
        "vocab_size": 8,
        "num_layers": 1,
        "embed_dim": 8,
        "num_heads": 1,
        "num_kv_heads": 1,
        "mlp_dim": 8,
        "max_length": 131072,
    }
    return ModelConfig(**{**shape, "head_dim": head_dim, **changes})


LLAMA31 = RopeScaling("llama3", 8.0, 8192)
LLAMA32 = RopeScaling("llama3", 32.0, 8192)
QWEN3 = RopeScaling("yarn", 4.0, 32768)
CLAMPED = RopeScaling("yarn", 4.0, 64)  # both ends of the ramp fall outside of the dimensions


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (500000.0, 128, LLAMA31),
        (500000.0, 64, LLAMA32),
        (1e6, 128, QWEN3),
        (10000.0, 128, RopeScaling("yarn", 16.0, 4096, beta_fast=24.0, beta_slow=2.0)),
        (2.0, 16, CLAMPED),
    ],
)
def test_scaled_frequencies_are_hugging_faces(theta, head_dim, scaling):
    parameters = {
        "rope_type": scaling.kind,
        "rope_theta": theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    else:
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=parameters
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, device="cpu")
    ours, factor = frequencies(model(head_dim, rope_theta=theta, rope_scaling=scaling))
    assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert_allclose(factor, their_factor, rtol=1e-12)


def test_plain_frequencies_by_hand():
    ours, factor = frequencies(model(8))
    assert_allclose(ours, [1, 0.1, 0.01, 0.001], rtol=1e-12)
    assert factor == 1.0


def rotated(config: ModelConfig, x, positions):
    return rotate(x, *rotations(config, jnp.asarray(positions)))


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA31}, {"rope_fraction": 0.25}], ids=str)
def test_scores_depend_on_the_distance_alone(changes):
    config = model(16, **changes)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    near = rotated(config, q, [[7]]) * rotated(config, k, [[3]])
    far = rotated(config, q, [[1007]]) * rotated(config, k, [[1003]])
    other = rotated(config, q, [[8]]) * rotated(config, k, [[3]])
    assert_allclose(near.sum(), far.sum(), atol=1e-3)
    assert abs(near.sum() - other.sum()) > 1e-2
    assert_allclose(
        jnp.linalg.norm(rotated(config, q, [[1007]])), jnp.linalg.norm(q), rtol=1e-5, err_msg="a rotation"
    )


def test_the_unrotated_dimensions_pass():
    config = model(16, rope_fraction=0.25)
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions = np.broadcast_to(np.arange(5), (2, 5))
    y = rotated(config, x, positions)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    assert np.all(np.abs(y[:, 1:, :, :4] - x[:, 1:, :, :4]).max(-1) > 1e-3)


def test_pairs_turn_by_their_angle():
    """Dimensions i and i + half are one complex number, which is multiplied by e^(i angle)."""
    config = model(6, rope_theta=50.0)
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 6))
    angles = np.array([[3.0, 0.0, 11.0, 2.0]])[..., None] * frequencies(config)[0]
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, :, None]
    ours = rotated(config, jnp.asarray(x, jnp.float32), [[3, 0, 11, 2]])
    assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_fraction": 0.25, "head_dim": 12}, "even number"),
        ({"rope_fraction": 1.5}, "rope_fraction"),
        ({"rope_scaling": {"kind": "yarn", "factor": 0.5, "original_length": 8}}, "factor"),
    ],
)
def test_impossible_rotations_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        parse(ModelConfig, {**dataclasses.asdict(model()), **changes})
