"""GPT-NeoX, which Pythia is: query, key and value of each head side by side in one tensor."""

from export.families.family import NEOX_KEYS, Family
from export.families.table import Row

_LAYER = "gpt_neox.layers.{layer}"
TABLE = (
    Row("embedding", "gpt_neox.embed_in.weight", "v d -> v d"),
    Row("blocks.attention_norm.scale", f"{_LAYER}.input_layernorm.weight", "d -> d"),
    Row("blocks.attention_norm.bias", f"{_LAYER}.input_layernorm.bias", "d -> d"),
    Row(
        "blocks.attention.{query|key|value}.kernel",
        f"{_LAYER}.attention.query_key_value.weight",
        "c d h k -> (h c k) d",
    ),
    Row(
        "blocks.attention.{query|key|value}.bias",
        f"{_LAYER}.attention.query_key_value.bias",
        "c h k -> (h c k)",
    ),
    Row("blocks.attention.out.kernel", f"{_LAYER}.attention.dense.weight", "h k d -> d (h k)"),
    Row("blocks.attention.out.bias", f"{_LAYER}.attention.dense.bias", "d -> d"),
    Row("blocks.mlp_norm.scale", f"{_LAYER}.post_attention_layernorm.weight", "d -> d"),
    Row("blocks.mlp_norm.bias", f"{_LAYER}.post_attention_layernorm.bias", "d -> d"),
    Row("blocks.mlp.up.kernel", f"{_LAYER}.mlp.dense_h_to_4h.weight", "d f -> f d"),
    Row("blocks.mlp.up.bias", f"{_LAYER}.mlp.dense_h_to_4h.bias", "f -> f"),
    Row("blocks.mlp.down.kernel", f"{_LAYER}.mlp.dense_4h_to_h.weight", "f d -> d f"),
    Row("blocks.mlp.down.bias", f"{_LAYER}.mlp.dense_4h_to_h.bias", "d -> d"),
    Row("norm.scale", "gpt_neox.final_layer_norm.weight", "d -> d"),
    Row("norm.bias", "gpt_neox.final_layer_norm.bias", "d -> d"),
    Row("head", "embed_out.weight", "v d -> v d"),
)

GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    table=TABLE,
    keys=NEOX_KEYS | {"parallel_residual": "use_parallel_residual"},
    expresses={
        "norm": ("layer",),
        "activation": ("gelu",),
        "bias": ("all",),
        "qk_norm": (False,),
        "window": (None,),
        "sparsity": (None,),
        "moe": (None,),
        "num_heads / num_kv_heads": (1,),
        "num_heads x head_dim / embed_dim": (1,),
    },
    fixed={"hidden_act": "gelu", "attention_bias": True},
    defaults={"layer_norm_eps": 1e-5, "use_parallel_residual": True},
    rope_fraction=0.25,
    buffers=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
