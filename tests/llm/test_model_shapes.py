"""The known shapes: complete experiments, and the parameter counts of the models they are named after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.config import load
from llm.config import Experiment
from llm.model.transformer import blueprint

CONFIGS = Path(__file__).parents[2] / "configs" / "llm"

# What Hugging Face's `config.json` of each model says.
LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
PYTHIA: dict[str, Any] = {"vocab_size": 50304, "max_position_embeddings": 2048}
REFERENCES: dict[str, tuple[int, Any]] = {
    "llama2-7b": (
        6_738_415_616,
        transformers.LlamaConfig(
            **LLAMA2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, rms_norm_eps=1e-5
        ),
    ),
    "llama2-70b": (
        68_976_648_192,
        transformers.LlamaConfig(
            **(LLAMA2 | {"num_attention_heads": 64, "num_key_value_heads": 8}),
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            rms_norm_eps=1e-5,
        ),
    ),
    "llama3-8b": (
        8_030_261_248,
        transformers.LlamaConfig(
            **LLAMA3,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    "llama3-70b": (
        70_553_706_496,
        transformers.LlamaConfig(
            **LLAMA3,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    "llama3.1-8b": (
        8_030_261_248,
        transformers.LlamaConfig(
            **(LLAMA3 | {"max_position_embeddings": 131072}),
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    "llama-1b": (
        1_235_814_400,
        transformers.LlamaConfig(
            **(LLAMA3 | {"max_position_embeddings": 131072}),
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            head_dim=64,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    "mistral-7b": (
        7_241_732_096,
        transformers.MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            sliding_window=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "qwen2-7b": (
        7_615_616_512,
        transformers.Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "qwen3-8b": (
        8_190_735_360,
        transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "mixtral-8x7b": (
        46_702_792_704,
        transformers.MixtralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.02,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "qwen3-30b-a3b": (
        30_532_122_624,
        transformers.Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=40960,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "pythia-160m": (
        162_322_944,
        transformers.GPTNeoXConfig(
            **PYTHIA,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        ),
    ),
    "pythia-1.4b": (
        1_414_647_808,
        transformers.GPTNeoXConfig(
            **PYTHIA,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_known_shape(name):
    count, reference = REFERENCES[name]
    experiment = load(Experiment, CONFIGS / f"{name}.yaml")
    config = experiment.model
    assert blueprint(config).count == count
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(reference)
    assert sum(p.numel() for p in model.parameters()) == count

    # What a count doesn't show.
    rope = reference.rope_parameters
    epsilon = reference.layer_norm_eps if config.norm == "layer" else reference.rms_norm_eps
    assert config.norm_epsilon == epsilon
    assert config.rope_theta == rope["rope_theta"]
    assert config.rope_fraction == rope.get("partial_rotary_factor", 1.0)
    assert (config.rope_scaling and config.rope_scaling.kind) == (
        None if rope["rope_type"] == "default" else rope["rope_type"]
    )
    assert config.max_length == reference.max_position_embeddings
    assert config.num_heads == reference.num_attention_heads
    assert config.num_kv_heads == getattr(reference, "num_key_value_heads", config.num_heads)
    assert config.window == getattr(reference, "sliding_window", None)
    assert config.tied_head == reference.tie_word_embeddings
    assert config.parallel_residual == getattr(reference, "use_parallel_residual", False)
    assert config.activation == {"silu": "swiglu", "gelu": "gelu"}[reference.hidden_act]
    if config.moe is not None:
        assert config.moe.top_k == reference.num_experts_per_tok
        assert config.moe.balance_loss == reference.router_aux_loss_coef
        assert config.moe.normalize_top_k == getattr(reference, "norm_topk_prob", True)


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "llama-1b"])  # that is for one GPU
def test_a_step_divides_over_a_realistic_cluster(name):
    """Microbatches split over 64 devices (512 where the shape is spread over 512), heads over tensor."""
    experiment = load(Experiment, CONFIGS / f"{name}.yaml")
    mesh, config = experiment.mesh, experiment.model
    devices = max(64, mesh.fsdp * mesh.expert * mesh.tensor)
    assert (experiment.data.batch_size // experiment.train.accumulation) % (devices // mesh.tensor) == 0
    assert config.num_kv_heads % mesh.tensor == config.mlp_dim % mesh.tensor == 0
    assert config.embed_dim % mesh.fsdp == config.vocab_size % mesh.tensor == 0
    assert config.moe is None or config.moe.num_experts % mesh.expert == 0
