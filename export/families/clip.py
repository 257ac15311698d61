"""CLIP: OpenAI's, OpenCLIP's in the same shape, and runs here that have CLIP's pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.dual import DualFamily, norm, tower
from export.families.family import Keys
from export.families.table import Row

TABLE = (
    Row("text.embedding", "text_model.embeddings.token_embedding.weight", "v d -> v d"),
    Row("text.positions", "text_model.embeddings.position_embedding.weight", "t d -> t d"),
    *tower("text", "text_model"),
    *norm("text.norm", "text_model.final_layer_norm"),
    Row("image.token", "vision_model.embeddings.class_embedding", "d -> d"),
    Row("image.patches.kernel", "vision_model.embeddings.patch_embedding.weight", "h w c d -> d c h w"),
    Row("image.positions", "vision_model.embeddings.position_embedding.weight", "n d -> n d"),
    *norm("image.norm_in", "vision_model.pre_layrnorm"),  # theirs is spelled so
    *tower("image", "vision_model"),
    *norm("image.norm", "vision_model.post_layernorm"),
    Row("image.projection.kernel", "visual_projection.weight", "d e -> e d"),
    Row("text.projection.kernel", "text_projection.weight", "d e -> e d"),
    Row("logit_scale", "logit_scale", " -> "),
)


def _write(joint_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    said = {"projection_dim": joint_dim}
    return said, said


def _read(top: Keys, sections: Mapping[str, Keys]) -> Any:
    return top.take("projection_dim", 512)  # those of the sections are for a tower that stands alone


CLIP = DualFamily(
    name="clip",
    architecture="CLIPModel",
    table=TABLE,
    colours={},  # ours are OpenAI's
    fixed={"image.pool": "class", "text.pool": "end", "text.causal": True, "logit_bias": False},
    defaults={
        "text": {
            "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "image": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
    },
    write=_write,
    read=_read,
)  # fmt: skip
