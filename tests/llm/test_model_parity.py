"""Logits and gradients against Hugging Face's implementations: random weights, odd shapes, float32."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llm.model.config import ModelConfig, MoEConfig, RopeScaling
from llm.model.transformer import blueprint

LAYERS, VOCAB = 2, 71
BATCH, LENGTH = 2, 23

# Head dimension is not embed / heads, heads are grouped, nothing is a power of two that needn't be.
OURS = ModelConfig(
    vocab_size=VOCAB,
    num_layers=LAYERS,
    embed_dim=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=52,
    max_length=64,
    norm_epsilon=1e-3,
)
THEIRS = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 52,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
NEOX_OURS = dataclasses.replace(
    OURS,
    num_kv_heads=6,
    head_dim=8,
    norm="layer",
    activation="gelu",
    bias="all",
    rope_fraction=0.25,
    parallel_residual=True,
)
NEOX_THEIRS = {
    k: v for k, v in THEIRS.items() if k not in ("num_key_value_heads", "head_dim", "rms_norm_eps")
}
NEOX_THEIRS |= {"layer_norm_eps": 1e-3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
EXPERTS = MoEConfig(num_experts=5, top_k=2, balance_loss=0.7, router_z_loss=0.3)
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}


def case(theirs, change=(), shape=THEIRS, ours=OURS, **other):
    return dataclasses.replace(ours, **dict(change)), functools.partial(theirs, **(shape | other))


CASES = {
    "llama": case(transformers.LlamaConfig),
    "llama-tied-all-biases": case(
        transformers.LlamaConfig,
        {"tied_head": True, "bias": "all"},
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-llama3-rope": case(
        transformers.LlamaConfig,
        {"rope_theta": 500.0, "rope_scaling": RopeScaling("llama3", 8.0, 24)},
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama-yarn": case(
        transformers.LlamaConfig,
        {"rope_theta": 100.0, "rope_scaling": RopeScaling("yarn", 4.0, 16, beta_fast=2.0, beta_slow=0.5)},
        rope_parameters=YARN_ROPE,
    ),
    "mistral-window": case(transformers.MistralConfig, {"window": 5}, sliding_window=5),
    "qwen2": case(
        # Qwen2Config doesn't declare a head dimension, but its model reads one.
        transformers.Qwen2Config,
        {"bias": "qkv", "rope_theta": 1e6},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3-tied": case(
        transformers.Qwen3Config, {"qk_norm": True, "tied_head": True}, tie_word_embeddings=True
    ),
    "mixtral": case(
        transformers.MixtralConfig,  # its own default for theta
        {"moe": EXPERTS, "rope_theta": 1e6},
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "qwen3-moe": case(
        transformers.Qwen3MoeConfig,
        {"moe": dataclasses.replace(EXPERTS, top_k=3), "qk_norm": True},
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        moe_intermediate_size=52,
        intermediate_size=31,
    ),
    "qwen3-moe-weights-as-they-are": case(
        transformers.Qwen3MoeConfig,
        {"moe": dataclasses.replace(EXPERTS, normalize_top_k=False), "qk_norm": True},
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        moe_intermediate_size=52,
    ),
    "neox": case(transformers.GPTNeoXConfig, shape=NEOX_THEIRS, ours=NEOX_OURS),
    "neox-sequential": case(
        transformers.GPTNeoXConfig,
        {"parallel_residual": False, "rope_fraction": 0.5},
        shape=NEOX_THEIRS,
        ours=NEOX_OURS,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
}


def convert_llama(config: ModelConfig, w: dict[str, np.ndarray]) -> dict:
    """Weights, or gradients, of a Llama, Mistral or Qwen under our names, in our layouts."""
    d, h, g, k = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim

    def layer(i: int) -> dict:
        def get(name, *shape):
            return w[f"model.layers.{i}.{name}"].T.reshape(*shape)

        def linear(name, kernel, bias):
            out = {"kernel": get(f"{name}.weight", *kernel)}
            if f"model.layers.{i}.{name}.bias" in w:
                out["bias"] = get(f"{name}.bias", *bias)
            return out

        attention = {
            "query": linear("self_attn.q_proj", (d, h, k), (h, k)),
            "key": linear("self_attn.k_proj", (d, g, k), (g, k)),
            "value": linear("self_attn.v_proj", (d, g, k), (g, k)),
            "out": linear("self_attn.o_proj", (h, k, d), (d,)),
        }
        if config.qk_norm:
            attention["q_norm"] = {"scale": get("self_attn.q_norm.weight", k)}
            attention["k_norm"] = {"scale": get("self_attn.k_norm.weight", k)}
        return {
            "attention_norm": {"scale": get("input_layernorm.weight", d)},
            "attention": attention,
            "mlp_norm": {"scale": get("post_attention_layernorm.weight", d)},
            "mlp": mlp(linear) if config.moe is None else experts(f"model.layers.{i}.mlp"),
        }

    def mlp(linear) -> dict:
        return {
            "gate": linear("mlp.gate_proj", (d, -1), (-1,)),
            "up": linear("mlp.up_proj", (d, -1), (-1,)),
            "down": linear("mlp.down_proj", (-1, d), (d,)),
        }

    def experts(name: str) -> dict:
        gate, up = np.split(w[f"{name}.experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
        kernels = {"gate": gate, "up": up, "down": w[f"{name}.experts.down_proj"].swapaxes(1, 2)}
        return {k: {"kernel": v} for k, v in kernels.items()} | {"router": w[f"{name}.gate.weight"].T}

    params = {
        "embedding": w["model.embed_tokens.weight"],
        "blocks": jax.tree.map(lambda *x: np.stack(x), *map(layer, range(LAYERS))),
        "norm": {"scale": w["model.norm.weight"]},
    }
    return params if config.tied_head else params | {"head": w["lm_head.weight"]}


def convert_neox(config: ModelConfig, w: dict[str, np.ndarray]) -> dict:
    """The same for a GPT-NeoX, which keeps query, key and value of each head side by side."""
    d, h, k = config.embed_dim, config.num_heads, config.head_dim

    def layer(i: int) -> dict:
        def get(name):
            return w[f"gpt_neox.layers.{i}.{name}"]

        def norm(name):
            return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

        kernels = get("attention.query_key_value.weight").reshape(h, 3, k, d)
        biases = get("attention.query_key_value.bias").reshape(h, 3, k)
        attention = {
            name: {"kernel": kernels[:, j].transpose(2, 0, 1), "bias": biases[:, j]}
            for j, name in enumerate(("query", "key", "value"))
        }
        attention["out"] = {
            "kernel": get("attention.dense.weight").T.reshape(h, k, d),
            "bias": get("attention.dense.bias"),
        }
        return {
            "attention_norm": norm("input_layernorm"),
            "attention": attention,
            "mlp_norm": norm("post_attention_layernorm"),
            "mlp": {
                "up": {"kernel": get("mlp.dense_h_to_4h.weight").T, "bias": get("mlp.dense_h_to_4h.bias")},
                "down": {"kernel": get("mlp.dense_4h_to_h.weight").T, "bias": get("mlp.dense_4h_to_h.bias")},
            },
        }

    return {
        "embedding": w["gpt_neox.embed_in.weight"],
        "blocks": jax.tree.map(lambda *x: np.stack(x), *map(layer, range(LAYERS))),
        "norm": {
            "scale": w["gpt_neox.final_layer_norm.weight"],
            "bias": w["gpt_neox.final_layer_norm.bias"],
        },
        "head": w["embed_out.weight"] if "embed_out.weight" in w else w["lm_head.weight"],
    }


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))


@functools.cache
def reference(name: str):
    """Logits, weights and gradients of the training objective, the latter two under our names."""
    config, make = CASES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also the biases and norms that start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.15)
    batch = torch.tensor(tokens())
    extra = {"output_router_logits": True} if config.moe else {}
    out = model(batch, **extra)
    logits = out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
    if moe := config.moe:
        for layer in out.router_logits:
            balance = load_balancing_loss_func((layer,), moe.num_experts, moe.top_k)
            z_loss = torch.logsumexp(layer, -1).square().mean()
            loss = loss + (moe.balance_loss * balance + moe.router_z_loss * z_loss) / LAYERS
    loss.backward()
    convert = convert_neox if config.norm == "layer" else convert_llama
    values = {name: p.detach().numpy() for name, p in model.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), convert(config, values), convert(config, gradients)


def forward(config: ModelConfig, params) -> tuple[jax.Array, jax.Array | float]:
    """Logits, and what the router's losses add to the objective."""
    batch = jnp.asarray(tokens(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), batch.shape)
    model = blueprint(config).bind(params)
    out, moe, added = model(batch, positions, jnp.ones_like(batch)), config.moe, 0.0
    if moe is not None:
        losses = out.routing
        added = moe.balance_loss * losses.balance_loss + moe.router_z_loss * losses.router_z_loss
    return model.logits(out.hidden), added


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_hugging_faces(name):
    config, _ = CASES[name]
    logits, params, gradients = reference(name)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, blueprint(config).shapes)

    def loss(params):
        ours, added = forward(config, params)
        log_probabilities = jax.nn.log_softmax(ours[:, :-1])
        picked = jnp.take_along_axis(log_probabilities, jnp.asarray(tokens())[:, 1:, None], axis=-1)
        return added - picked.mean(), ours

    got, ours = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params))
    assert np.std(logits) > 0.5, "logits near zero would agree whatever the model"
    assert_allclose(ours, logits, rtol=0, atol=1e-5)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(gradients), strict=True
    ):
        assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.parametrize("window", [4, 6])
def test_a_window_off_by_one_is_seen(window):
    config, _ = CASES["mistral-window"]
    logits, params, _ = reference("mistral-window")
    ours, _ = jax.jit(functools.partial(forward, dataclasses.replace(config, window=window)))(params)
    seen_alike = min(window, 5)
    assert_allclose(ours[:, :seen_alike], logits[:, :seen_alike], atol=1e-5)
    assert np.abs(ours[:, seen_alike] - logits[:, seen_alike]).max() > 1e-3
