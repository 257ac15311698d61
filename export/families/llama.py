"""Llama 2, 3 and 3.1, and the rows that most families share with it."""

from __future__ import annotations

from typing import Any

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, Family, Keys
from export.families.table import Row
from llm.model.config import ModelConfig

EMBEDDING = (Row("embedding", "model.embed_tokens.weight", "v d -> v d"),)
ATTENTION = (
    Row("blocks.attention_norm.scale", "model.layers.{layer}.input_layernorm.weight", "d -> d"),
    Row("blocks.attention.query.kernel", "model.layers.{layer}.self_attn.q_proj.weight", "d h k -> (h k) d"),
    Row("blocks.attention.query.bias", "model.layers.{layer}.self_attn.q_proj.bias", "h k -> (h k)"),
    Row("blocks.attention.key.kernel", "model.layers.{layer}.self_attn.k_proj.weight", "d g k -> (g k) d"),
    Row("blocks.attention.key.bias", "model.layers.{layer}.self_attn.k_proj.bias", "g k -> (g k)"),
    Row("blocks.attention.value.kernel", "model.layers.{layer}.self_attn.v_proj.weight", "d g k -> (g k) d"),
    Row("blocks.attention.value.bias", "model.layers.{layer}.self_attn.v_proj.bias", "g k -> (g k)"),
    Row("blocks.attention.out.kernel", "model.layers.{layer}.self_attn.o_proj.weight", "h k d -> d (h k)"),
    Row("blocks.attention.out.bias", "model.layers.{layer}.self_attn.o_proj.bias", "d -> d"),
    Row("blocks.mlp_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "d -> d"),
)
MLP = (
    Row("blocks.mlp.gate.kernel", "model.layers.{layer}.mlp.gate_proj.weight", "d f -> f d"),
    Row("blocks.mlp.gate.bias", "model.layers.{layer}.mlp.gate_proj.bias", "f -> f"),
    Row("blocks.mlp.up.kernel", "model.layers.{layer}.mlp.up_proj.weight", "d f -> f d"),
    Row("blocks.mlp.up.bias", "model.layers.{layer}.mlp.up_proj.bias", "f -> f"),
    Row("blocks.mlp.down.kernel", "model.layers.{layer}.mlp.down_proj.weight", "f d -> d f"),
    Row("blocks.mlp.down.bias", "model.layers.{layer}.mlp.down_proj.bias", "d -> d"),
)
HEAD = (
    Row("norm.scale", "model.norm.weight", "d -> d"),
    Row("head", "lm_head.weight", "v d -> v d"),
)


def _write(config: ModelConfig) -> dict[str, Any]:
    return dict.fromkeys(("attention_bias", "mlp_bias"), config.bias == "all")


def _read(keys: Keys) -> dict[str, Any]:
    attention, mlp = keys.take("attention_bias", False), keys.take("mlp_bias", False)
    if attention != mlp:
        raise keys.refuse("attention_bias", attention, f"supported where mlp_bias, here {mlp}, is the same")
    return {"bias": "all" if attention else "none"}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *MLP, *HEAD),
    keys=LLAMA_KEYS,
    expresses=LLAMA_SHAPE
    | {
        "bias": ("none", "all"),
        "qk_norm": (False,),
        "window": (None,),
        "moe": (None,),
        "remainder of embed_dim / num_heads": (0,),
    },
    fixed={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6},
    write=_write,
    read=_read,
)
