"""The families of models that others read, each a table in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip.model.config import CLIPConfig
from core.errors import UserError
from export.families.clip import CLIP
from export.families.dual import DualFamily
from export.families.family import Family
from export.families.gpt_neox import GPT_NEOX
from export.families.llama import LLAMA
from export.families.mistral import MISTRAL
from export.families.mixtral import MIXTRAL
from export.families.qwen2 import QWEN2
from export.families.qwen3 import QWEN3
from export.families.qwen3_moe import QWEN3_MOE
from export.families.siglip import SIGLIP
from llm.model.config import ModelConfig

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, GPT_NEOX)
DUAL_FAMILIES = (CLIP, SIGLIP)
_KIND = {"norm", "activation", "moe"}  # what tells kinds of models apart, before details


def family_of(config: ModelConfig) -> Family:
    """The family that a model is one of.

    Raises:
        UserError: if it is none's, naming what keeps it from the nearest.
    """

    def distance(family: Family) -> tuple[int, int]:
        missing = family.missing(config)
        return len(missing.keys() & _KIND), len(missing)

    nearest = min(FAMILIES, key=distance)
    if missing := nearest.missing(config):
        raise UserError(
            f"no family of models that is exported here computes what this one does: {nearest.name}, the "
            f"nearest, would need in `model` {', '.join(missing.values())}; train a model with that to "
            "export it"
        )
    return nearest


def dual_family_of(config: CLIPConfig) -> DualFamily:
    """The same for a dual encoder."""
    nearest = min(DUAL_FAMILIES, key=lambda family: len(family.missing(config)))
    if missing := nearest.missing(config):
        raise UserError(
            f"no kind of dual encoder that transformers has computes what this one does: {nearest.name}, the "
            f"nearest, would need in `model` {', '.join(missing.values())}; train a model with that to "
            "export it"
        )
    return nearest


def named_family(data: Mapping[str, Any], path: Path) -> Family | DualFamily:
    """The family that a `config.json` names. Raises `UserError` for one that isn't supported."""
    names: dict[str, Family | DualFamily] = {family.name: family for family in (*FAMILIES, *DUAL_FAMILIES)}
    name = data.get("model_type")
    if name not in names:
        raise UserError(f"{path}: model_type is {name!r}: supported are {', '.join(names)}")
    if "quantization_config" in data:
        raise UserError(f"{path}: the weights are quantized (quantization_config): take those that are not")
    return names[name]
