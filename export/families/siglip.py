"""SigLIP, whose image tower has no class token and no projection, and whose logits have a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.dual import DualFamily, mlp, norm, tower
from export.families.family import Keys
from export.families.table import Row

_HEAD = "vision_model.head"
TABLE = (
    Row("text.embedding", "text_model.embeddings.token_embedding.weight", "v d -> v d"),
    Row("text.positions", "text_model.embeddings.position_embedding.weight", "t d -> t d"),
    *tower("text", "text_model"),
    *norm("text.norm", "text_model.final_layer_norm"),
    Row("text.projection.kernel", "text_model.head.weight", "d e -> e d"),
    Row("text.projection.bias", "text_model.head.bias", "e -> e"),
    Row("image.patches.kernel", "vision_model.embeddings.patch_embedding.weight", "h w c d -> d c h w"),
    Row("image.patches.bias", "vision_model.embeddings.patch_embedding.bias", "d -> d"),
    Row("image.positions", "vision_model.embeddings.position_embedding.weight", "n d -> n d"),
    *tower("image", "vision_model"),
    *norm("image.norm", "vision_model.post_layernorm"),
    Row("image.head.probe", f"{_HEAD}.probe", "d -> () () d"),
    Row("image.head.{query|key|value}.kernel", f"{_HEAD}.attention.in_proj_weight", "c d h k -> (c h k) d"),
    Row("image.head.{query|key|value}.bias", f"{_HEAD}.attention.in_proj_bias", "c h k -> (c h k)"),
    Row("image.head.out.kernel", f"{_HEAD}.attention.out_proj.weight", "h k d -> d (h k)"),
    Row("image.head.out.bias", f"{_HEAD}.attention.out_proj.bias", "d -> d"),
    *norm("image.head.norm", f"{_HEAD}.layernorm"),
    *mlp("image.head.mlp", f"{_HEAD}.mlp"),
    Row("logit_scale", "logit_scale", " -> ()"),
    Row("logit_bias", "logit_bias", " -> ()"),
)


def _write(joint_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {"projection_size": joint_dim}


def _read(top: Keys, sections: Mapping[str, Keys]) -> Any:
    sections["image"].take("projection_size", None)
    head = sections["image"].take("vision_use_head", True)
    if head is not True:
        raise sections["image"].refuse("vision_use_head", head, "the image tower here pools with its head")
    return sections["text"].take("projection_size", sections["text"].get("hidden_size"))


SIGLIP = DualFamily(
    name="siglip",
    architecture="SiglipModel",
    table=TABLE,
    colours={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    fixed={"image.pool": "attention", "text.pool": "last", "text.causal": False, "logit_bias": True},
    defaults={
        "text": {
            "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "image": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
    },
    write=_write,
    read=_read,
)  # fmt: skip
