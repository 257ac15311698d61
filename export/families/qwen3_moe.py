"""Qwen3 with experts in every layer."""

from __future__ import annotations

from typing import Any

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, SET, Family, Keys
from export.families.llama import ATTENTION, EMBEDDING, HEAD
from export.families.mixtral import MOE_KEYS
from export.families.qwen3 import QK_NORMS
from export.families.table import Row
from llm.model.config import ModelConfig

_MLP = "model.layers.{layer}.mlp"
EXPERTS = (
    Row("blocks.mlp.router", f"{_MLP}.gate.weight", "d e -> e d"),
    Row("blocks.mlp.gate.kernel", f"{_MLP}.experts.{{expert}}.gate_proj.weight", "d f -> f d"),
    Row("blocks.mlp.up.kernel", f"{_MLP}.experts.{{expert}}.up_proj.weight", "d f -> f d"),
    Row("blocks.mlp.down.kernel", f"{_MLP}.experts.{{expert}}.down_proj.weight", "f d -> d f"),
)


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "num_experts": config.moe.num_experts,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "intermediate_size": config.mlp_dim,  # of layers without experts, of which there are none
    }


def _read(keys: Keys) -> dict[str, Any]:
    keys.take("intermediate_size", None)
    keys.take("max_window_layers", None)  # this family has the window in all layers or none
    window = keys.take("sliding_window", 4096)
    experts = keys.take("num_local_experts", 128)  # the name since transformers 5
    return {
        "moe.num_experts": keys.take("num_experts", experts),
        "window": window if keys.take("use_sliding_window", False) else None,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *QK_NORMS, *EXPERTS, *HEAD),
    keys=LLAMA_KEYS
    | MOE_KEYS
    | {"mlp_dim": "moe_intermediate_size", "moe.normalize_top_k": "norm_topk_prob"},
    expresses=LLAMA_SHAPE
    | {"bias": ("none",), "qk_norm": (True,), "moe": (SET,), "moe.shared_mlp_dim": (0,)},
    fixed={"hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    defaults={
        "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
        "norm_topk_prob": False,
    },
    write=_write,
    read=_read,
)
