"""Hugging Face models of every family, small and of odd shapes, with random weights; and folders of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
import transformers
from tiny import copy_corpus

from llm.model.config import ModelConfig, MoEConfig, RopeScaling
from llm.tokenizer import save, train_bpe

LAYERS, VOCAB = 2, 271

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
EXPERTS = MoEConfig(num_experts=5, top_k=2, balance_loss=0.7)
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
    "qwen2-tied-window": case(
        transformers.Qwen2Config,
        {"bias": "qkv", "tied_head": True, "window": 5},
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
    ),
    "qwen3-tied": case(
        transformers.Qwen3Config, {"qk_norm": True, "tied_head": True}, tie_word_embeddings=True
    ),
    "mixtral": case(
        transformers.MixtralConfig,  # its own default for theta
        {"moe": EXPERTS, "rope_theta": 1e6},
        num_local_experts=5,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.7,
    ),
    "qwen3-moe": case(
        transformers.Qwen3MoeConfig,
        {"moe": dataclasses.replace(EXPERTS, top_k=3), "qk_norm": True},
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        moe_intermediate_size=52,
        intermediate_size=31,
        router_aux_loss_coef=0.7,
    ),
    "qwen3-moe-weights-as-they-are": case(
        transformers.Qwen3MoeConfig,
        {"moe": dataclasses.replace(EXPERTS, normalize_top_k=False), "qk_norm": True},
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        moe_intermediate_size=52,
        router_aux_loss_coef=0.7,
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


def make(name: str) -> transformers.PreTrainedModel:
    """A model of this case in float32, all of whose weights are random."""
    torch.manual_seed(0)
    _, config = CASES[name]
    model = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # also the biases and norms that start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


def write(name: str, folder: Path, corpus: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """The checkpoint of a case as transformers writes it, with a tokenizer of ours of as many ids."""
    make(name).to(dtype).save_pretrained(folder, **options)
    texts = [path.read_text() for path in copy_corpus(corpus).glob("*.py")]
    save(train_bpe(texts, VOCAB), folder)
    return folder
