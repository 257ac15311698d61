"""Qwen3: Llama with an RMSNorm on each head's query and key."""

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, Family
from export.families.llama import ATTENTION, EMBEDDING, HEAD, MLP
from export.families.qwen2 import read_window, write_window
from export.families.table import Row

QK_NORMS = (
    Row("blocks.attention.q_norm.scale", "model.layers.{layer}.self_attn.q_norm.weight", "k -> k"),
    Row("blocks.attention.k_norm.scale", "model.layers.{layer}.self_attn.k_norm.weight", "k -> k"),
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *QK_NORMS, *MLP, *HEAD),
    keys=LLAMA_KEYS,
    expresses=LLAMA_SHAPE | {"bias": ("none",), "qk_norm": (True,), "moe": (None,)},
    fixed={"hidden_act": "silu", "attention_bias": False},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128},
    write=write_window,
    read=read_window,
)
