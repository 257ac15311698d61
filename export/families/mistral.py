"""Mistral: Llama with attention to the last `window` tokens. (Without a window it is a Llama.)"""

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, SET, Family
from export.families.llama import ATTENTION, EMBEDDING, HEAD, MLP

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *MLP, *HEAD),
    keys=LLAMA_KEYS | {"window": "sliding_window"},
    expresses=LLAMA_SHAPE | {"bias": ("none",), "qk_norm": (False,), "window": (SET,), "moe": (None,)},
    fixed={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6},
)
