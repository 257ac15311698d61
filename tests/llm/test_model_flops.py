"""The analytic count against a calculation by hand, against traced products, and against XLA's count."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from programs import products

from core.config import load
from llm.config import Experiment
from llm.model.config import ModelConfig, MoEConfig, Sparsity
from llm.model.flops import (
    active_parameters,
    forward_flops_per_token,
    matmul_parameters,
    num_parameters,
    training_flops_per_token,
    visible_keys,
)
from llm.model.loss import cross_entropy
from llm.model.transformer import Compute, blueprint

CONFIGS = Path(__file__).parents[2] / "configs" / "llm"
LENGTH = 64
SMALL = ModelConfig(
    vocab_size=512,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=40,
    mlp_dim=384,
    max_length=LENGTH,
)


def test_llama2_7b_by_hand():
    config = load(Experiment, CONFIGS / "llama2-7b.yaml").model
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    weights = 32 * per_layer + 32000 * 4096
    assert matmul_parameters(config) == weights == 6_607_077_376
    attention = 32 * 12 * 4096 * 4096 // 2
    assert training_flops_per_token(config, 4096) == 6 * weights + attention
    assert forward_flops_per_token(config, 4096) == (6 * weights + attention) / 3


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2-7b", "qwen3-8b", "pythia-160m"])
def test_matmul_parameters_are_the_declared_kernels(name):
    """A parameter with more than one axis is a factor of a product, but for the embedding's rows."""
    config = load(Experiment, CONFIGS / f"{name}.yaml").model
    shapes = dict(jax.tree_util.tree_leaves_with_path(blueprint(config).shapes))
    kernels = [
        leaf.size
        for path, leaf in shapes.items()
        if jax.tree_util.keystr(path).endswith("['kernel']") or jax.tree_util.keystr(path) == "['head']"
    ]
    assert matmul_parameters(config) == sum(kernels)


@pytest.mark.parametrize("name, active", [("mixtral-8x7b", 12_879_925_248), ("qwen3-30b-a3b", 3_353_032_704)])
def test_a_token_takes_its_experts_alone(name, active):
    """The idle experts are what the declared parameters have beyond the active ones."""
    config = load(Experiment, CONFIGS / f"{name}.yaml").model
    mlp = blueprint(config).shapes["blocks"]["mlp"]
    experts = sum(mlp[kernel]["kernel"].size for kernel in ("gate", "up", "down"))
    idle = experts // config.moe.num_experts * (config.moe.num_experts - config.moe.top_k)
    assert active_parameters(config) == active == blueprint(config).count - idle
    assert num_parameters(config) == blueprint(config).count
    assert matmul_parameters(config) < active


def test_a_tied_head_still_costs():
    assert matmul_parameters(SMALL) == matmul_parameters(dataclasses.replace(SMALL, tied_head=True))


def test_a_window_hides_keys():
    """Half of all keys without one; each query sees the window once the sequence is long."""
    exact = lambda window, length: sum(min(i + 1, window) for i in range(length)) / length  # noqa: E731
    assert visible_keys(SMALL, 1000) == 500
    assert visible_keys(dataclasses.replace(SMALL, window=1000), 1000) == 500
    assert visible_keys(dataclasses.replace(SMALL, window=5000), 1000) == 500
    for window in (100, 400):
        ours = visible_keys(dataclasses.replace(SMALL, window=window), 1000)
        assert ours == pytest.approx(exact(window, 1000), abs=0.5)


def test_block_sparsity_hides_keys():
    """By hand: blocks of 100 in 1000 tokens; a query sees half its own block, three others, the first two."""
    sparse = dataclasses.replace(SMALL, sparsity=Sparsity(100, 4, 2))
    before = [0, 100, 200, 300, 400, 500, 500, 500, 500, 500]
    assert visible_keys(sparse, 1000) == 50 + sum(before) / 10


def loss(config: ModelConfig, params, tokens):
    ones = jnp.ones_like(tokens)
    model = blueprint(config, Compute(scan_layers=False)).bind(params)
    hidden = model(tokens, ones, ones).hidden
    return cross_entropy(hidden, model.head_kernel, tokens, ones.astype(jnp.float32), chunk=LENGTH)[0]


MOE = MoEConfig(num_experts=4, top_k=2, shared_mlp_dim=40, capacity=1.0)  # as many slots as choices


@pytest.mark.parametrize("change", [{}, {"activation": "gelu"}, {"moe": MOE}], ids=str)
def test_equals_the_traced_products(change):
    """The reference form of attention computes the hidden half too: with it the counts are equal."""
    config = dataclasses.replace(SMALL, **change)
    tokens = jnp.zeros((2, LENGTH), jnp.int32)
    gradient = jax.grad(functools.partial(loss, config))
    found = products(jax.make_jaxpr(gradient)(blueprint(config).shapes, tokens).jaxpr)
    hidden_half = 12 * config.num_layers * config.num_heads * config.head_dim * LENGTH / 2
    expected = training_flops_per_token(config, LENGTH) + hidden_half
    assert sum(flops for _, flops in found) == expected * tokens.size


def test_is_near_xlas_count():
    """XLA counts element-wise work too, and each pass over the hidden half of the attention map."""
    tokens = jnp.zeros((2, LENGTH), jnp.int32)
    compiled = (
        jax.jit(jax.grad(functools.partial(loss, SMALL))).lower(blueprint(SMALL).shapes, tokens).compile()
    )
    cost = compiled.cost_analysis()
    assert cost is not None
    counted = cost["flops"] / tokens.size
    assert counted == pytest.approx(training_flops_per_token(SMALL, LENGTH), rel=0.1)
    assert counted > training_flops_per_token(SMALL, LENGTH)
