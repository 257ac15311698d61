"""Mixtral: Mistral with experts. On disk each is three tensors; w1 is the gate, w3 goes up, w2 down."""

from export.families.family import LLAMA_KEYS, LLAMA_SHAPE, SET, Family
from export.families.llama import ATTENTION, EMBEDDING, HEAD
from export.families.table import Row

_MOE = "model.layers.{layer}.block_sparse_moe"
EXPERTS = (
    Row("blocks.mlp.router", f"{_MOE}.gate.weight", "d e -> e d"),
    Row("blocks.mlp.gate.kernel", f"{_MOE}.experts.{{expert}}.w1.weight", "d f -> f d"),
    Row("blocks.mlp.down.kernel", f"{_MOE}.experts.{{expert}}.w2.weight", "f d -> d f"),
    Row("blocks.mlp.up.kernel", f"{_MOE}.experts.{{expert}}.w3.weight", "d f -> f d"),
)
MOE_KEYS = {"moe.top_k": "num_experts_per_tok", "moe.balance_loss": "router_aux_loss_coef"}

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    table=(*EMBEDDING, *ATTENTION, *EXPERTS, *HEAD),
    keys=LLAMA_KEYS | MOE_KEYS | {"window": "sliding_window", "moe.num_experts": "num_local_experts"},
    expresses=LLAMA_SHAPE
    | {
        "bias": ("none",),
        "qk_norm": (False,),
        "moe": (SET,),
        "moe.shared_mlp_dim": (0,),
        "moe.normalize_top_k": (True,),
    },
    fixed={"hidden_act": "silu"},
    defaults={
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    rope_theta=1e6,
)
