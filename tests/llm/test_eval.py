"""Held-out figures and the baselines beside them, against hand computations."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.mesh import make_mesh
from core.options import MeshConfig
from llm.data.loader import Batch
from llm.eval.baselines import baselines
from llm.eval.heldout import make_evaluate
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint


def test_unigram_pays_for_each_token_by_its_training_count():
    text = b"abcabca" * 30
    train, heldout = np.array([5, 2, 0]), np.array([90, 60, 60])
    # Laplace: (5 + 1) / 10, (2 + 1) / 10, (0 + 1) / 10
    bits = 90 * -math.log2(0.6) + 60 * -math.log2(0.3) + 60 * -math.log2(0.1)
    assert baselines(text, train, heldout)["unigram_bits_per_byte"] == pytest.approx(bits / len(text))


@pytest.mark.parametrize(
    ("command", "tolerance"),
    [(["gzip", "-9nc"], 0.03), (["xz", "-9ec"], 0.001)],  # gzip's own code finds other matches than zlib
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_compressors_are_those_of_the_command_line(command, tolerance):
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    text = b"".join(path.read_bytes() for path in sorted((Path(__file__).parents[2] / "core").glob("*.py")))
    size = len(subprocess.run(command, input=text, capture_output=True, check=True).stdout)
    costs = baselines(text, np.ones(3), np.ones(3))
    assert costs[f"{command[0]}_bits_per_byte"] == pytest.approx(8 * size / len(text), rel=tolerance)


def test_heldout_loss_counts_each_weighted_target_once():
    config = ModelConfig(
        vocab_size=32,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=32,
        max_length=8,
    )
    rng = np.random.default_rng(0)
    model = blueprint(config)
    params = jax.jit(model.init)(jax.random.key(0))
    lengths = rng.integers(0, 5, (2, 32)).astype(np.int32)
    batches = []
    for _ in range(3):
        tokens = rng.integers(0, 32, (4, 9)).astype(np.int32)
        weights = rng.choice(np.float32([0, 1, 2.5]), (4, 8))  # a document's weight is for training only
        positions = np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))
        ones = np.ones((4, 8), np.int32)
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, weights))
    nats = tokens_counted = size = 0.0
    bound = model.bind(params)
    for batch in batches:
        logits = bound.logits(bound(*map(jnp.asarray, (batch.tokens, batch.positions, ones))).hidden)
        log_p = np.asarray(jax.nn.log_softmax(logits))
        picked = np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        counted = batch.weights > 0
        nats -= picked[counted].sum()
        tokens_counted += counted.sum()
        begins = lengths[0][batch.tokens] == 0
        size += np.where(begins, lengths[1][batch.targets], lengths[0][batch.targets])[counted].sum()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        got = make_evaluate(model, 4, lengths, mesh)(params, batches)
    assert got["heldout_loss"] == pytest.approx(nats / tokens_counted, rel=1e-5)
    assert got["heldout_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
