"""Rotary positions in a `config.json`, as transformers 5 writes them and as all before it did."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llm.model.config import ModelConfig

if TYPE_CHECKING:
    from export.families.family import Keys

# Ours, theirs, and the value where theirs is absent (None: it must be there).
_LLAMA3 = (
    ("factor", "factor", None),
    ("low_frequency_factor", "low_freq_factor", None),
    ("high_frequency_factor", "high_freq_factor", None),
)
_YARN = (("factor", "factor", None), ("beta_fast", "beta_fast", 32.0), ("beta_slow", "beta_slow", 1.0))
_SCALINGS = {"llama3": _LLAMA3, "yarn": _YARN}


def write_rope(config: ModelConfig, partial: bool) -> dict[str, Any]:
    """`rope_parameters` for transformers 5, and what readers before it look for.

    Args:
        partial: whether the family may rotate a part of each head, as GPT-NeoX does, which has names of its
            own for that.
    """
    scaling, scaled = config.rope_scaling, {}
    if scaling is not None:
        scaled = {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.original_length}
        scaled |= {theirs: getattr(scaling, ours) for ours, theirs, _ in _SCALINGS[scaling.kind]}
    fraction = {"partial_rotary_factor": config.rope_fraction} if partial else {}
    parameters = {"rope_type": "default", "rope_theta": config.rope_theta, **fraction, **scaled}
    old = {"rope_theta": config.rope_theta, "rope_scaling": scaled or None}
    if partial:
        old |= {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction}
    return {"rope_parameters": parameters, **old}


def read_rope(keys: Keys, theta: float, fraction: float | None) -> dict[str, Any]:
    """Our `rope_theta`, `rope_scaling` and `rope_fraction`.

    Args:
        theta, fraction: what the family has where the file is silent; no fraction: it rotates whole heads.

    Raises:
        UserError: for a scaling that we lack, or two of them.
    """
    new, old = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    if new and old and any(new.get(key, value) != value for key, value in old.items()):
        raise keys.refuse(
            "rope_scaling", old, f"rope_parameters says otherwise ({new}): remove the wrong one"
        )
    rope = {key: value for key, value in {**new, **old}.items() if value is not None}
    theta = keys.take("rotary_emb_base", keys.take("rope_theta", theta))
    theta = rope.pop("rope_theta", theta)
    part = keys.take("rotary_pct", keys.take("partial_rotary_factor", 1.0 if fraction is None else fraction))
    part = rope.pop("partial_rotary_factor", part)
    if fraction is None and part != 1:
        raise keys.refuse("partial_rotary_factor", part, "this family is supported with 1 alone")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    found = {"rope_theta": theta} | ({} if fraction is None else {"rope_fraction": part})
    if kind != "default":
        found["rope_scaling"] = _read_scaling(keys, kind, rope)
    if rope:
        key, value = next(iter(rope.items()))
        raise keys.refuse(f"rope_parameters.{key}", value, f"it means nothing here for rope type '{kind}'")
    return found


def _read_scaling(keys: Keys, kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    if kind not in _SCALINGS:
        raise keys.refuse("rope type", kind, f"supported are default, {', '.join(_SCALINGS)}")
    length = keys.take("original_max_position_embeddings", keys.get("max_position_embeddings"))
    scaling = {"kind": kind, "original_length": rope.pop("original_max_position_embeddings", length)}
    for ours, theirs, default in _SCALINGS[kind]:
        scaling[ours] = rope.pop(theirs, default)
        if scaling[ours] is None:
            raise keys.refuse("rope_parameters", {"rope_type": kind, **rope}, f"'{theirs}' is missing")
    if kind == "yarn":
        _check_temperature(keys, scaling["factor"], rope)
    return scaling


def _check_temperature(keys: Keys, factor: float, rope: dict[str, Any]) -> None:
    """YaRN's attention temperature is the paper's, whichever way the file says so."""
    usual = 0.1 * math.log(factor) + 1
    if not math.isclose(given := rope.pop("attention_factor", usual), usual, rel_tol=1e-6):
        raise keys.refuse("attention_factor", given, f"YaRN is supported with its own, {usual:.6g}, alone")
    if not rope.pop("truncate", True):
        raise keys.refuse("truncate", False, "YaRN is supported with true alone")
