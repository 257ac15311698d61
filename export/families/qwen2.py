"""Qwen2 and 2.5: Llama with biases on query, key and value; and how Qwen say which layers have a window."""

from __future__ import annotations

from typing import Any

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, Family, Keys
from export.families.llama import ATTENTION, EMBEDDING, HEAD, MLP
from llm.model.config import ModelConfig


def write_window(config: ModelConfig) -> dict[str, Any]:
    windowed = config.window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": config.window,
        "max_window_layers": 0 if windowed else config.num_layers,  # the first so many have none
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * config.num_layers,
    }


def read_window(keys: Keys) -> dict[str, Any]:
    layers, window = keys.get("num_hidden_layers", 0), keys.take("sliding_window", 4096)
    first, types = keys.take("max_window_layers", 28), keys.take("layer_types", None)
    if not keys.take("use_sliding_window", False):
        window, first = None, layers
    types = types or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if window is None or set(types) <= {"full_attention"}:
        if "sliding_attention" in types:
            raise keys.refuse(
                "layer_types", types, "some layers have a window, and use_sliding_window is false"
            )
        return {"window": None}
    if set(types) != {"sliding_attention"}:
        raise keys.refuse("layer_types", types, "all layers must have the window, or none")
    return {"window": window}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *MLP, *HEAD),
    keys=LLAMA_KEYS,
    expresses=LLAMA_SHAPE | {"bias": ("qkv",), "qk_norm": (False,), "moe": (None,)},
    fixed={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6},
    write=write_window,
    read=read_window,
)
