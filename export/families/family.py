"""What a family is: its table of tensors, and its `config.json` both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import parse, to_dict
from core.errors import UserError
from export.families.rope import read_rope, write_rope
from export.families.table import Row
from llm.model.config import ModelConfig

# What `config.json` says of training, of generating, or of the file, and not of the values of the model.
_BESIDE = (
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
    "classifier_dropout", "dtype", "eos_token_id", "hidden_dropout", "initializer_range", "is_decoder",
    "model_type", "output_router_logits", "pad_token_id", "pretraining_tp", "router_jitter_noise",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
_SHAPES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "tied_head": "tie_word_embeddings",
}
LLAMA_KEYS = _SHAPES | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
}
NEOX_KEYS = _SHAPES | {"mlp_dim": "intermediate_size", "norm_epsilon": "layer_norm_eps"}

SET = "set"  # any value but null
# The Llama shape: what all families but GPT-NeoX have in common.
LLAMA_SHAPE: dict[str, tuple[Any, ...]] = {
    "norm": ("rms",),
    "activation": ("swiglu",),
    "parallel_residual": (False,),
    "rope_fraction": (1.0,),
    "sparsity": (None,),
}


class Keys(dict):
    """The keys of a `config.json` that nobody has looked at yet. One that is null counts as absent."""

    def __init__(self, data: Mapping[str, Any], path: Path):
        super().__init__({key: value for key, value in data.items() if value is not None})
        self.path = path

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`, which is dealt with then."""
        return self.pop(key, default)

    def refuse(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path}: {key} is {value!r}: {why}")


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of model in `transformers`.

    Attributes:
        name: its `model_type`.
        architecture: the class of its language model.
        table: our parameters, its tensors.
        keys: of our model config, to the same number's in its `config.json`.
        expresses: the values of ours that it has, by key; a key that isn't named may have any.
        fixed: what its `config.json` says without ours having a key for it; no other value is read.
        defaults: what a key in its `config.json` means by its absence.
        write, read: whatever isn't one key to one key; `read` takes theirs and gives ours.
        buffers: a regular expression for tensors that old checkpoints hold beside the parameters.
    """

    name: str
    architecture: str
    table: tuple[Row, ...]
    keys: Mapping[str, str]
    expresses: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    read: Callable[[Keys], dict[str, Any]] = lambda keys: {}
    rope_theta: float = 10000.0  # where `config.json` names none
    rope_fraction: float | None = None  # the same; None: the family rotates whole heads
    buffers: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

    def missing(self, config: ModelConfig) -> dict[str, str]:
        """What this family would need `config` to be otherwise: by key, in words."""
        found, facts = {}, _facts(config)
        for key, allowed in self.expresses.items():
            value = facts[key]
            if value not in allowed and not (SET in allowed and value is not None):
                wanted = " or ".join("null" if v is None else str(v).lower() for v in allowed)
                has = "null" if value is None else "set" if isinstance(value, dict) else str(value).lower()
                found[key] = f"{key} {wanted} (it is {has})"
        return found

    def to_json(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of a model: what decides its values."""
        facts = _facts(config)
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **{theirs: facts[ours] for ours, theirs in self.keys.items()},
            **self.fixed,
            **self.write(config),
            **write_rope(config, self.rope_fraction is not None),
        }

    def from_json(self, data: Mapping[str, Any], path: Path) -> ModelConfig:
        """The model that a `config.json` describes.

        Raises:
            UserError: for a key that is missing, unknown, or has a value that a model of ours can't have.
        """
        keys = Keys(data, path)
        heads, width = keys.get("num_attention_heads"), keys.get("hidden_size")
        head_dim = 1
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:  # else that is told of below
            head_dim = width // heads
        derived = {"num_key_value_heads": heads, "tie_word_embeddings": False, "head_dim": head_dim}
        defaults = derived | dict(self.defaults)
        ours: dict[str, Any] = {
            key: allowed[0] for key, allowed in self.expresses.items() if _implied(key, allowed)
        }
        ours |= {"head_dim": head_dim} if "head_dim" not in self.keys else {}
        ours |= {"num_kv_heads": heads} if "num_kv_heads" not in self.keys else {}
        ours |= read_rope(keys, self.rope_theta, self.rope_fraction)
        ours |= self.read(keys)
        for key, theirs in self.keys.items():
            value = keys.take(theirs, defaults.get(theirs))
            if value is None and key != "window":
                raise UserError(f"{path}: the required key '{theirs}' is missing")
            ours[key] = value
        for key, value in self.fixed.items():
            found = keys.take(key, value)
            if found != value:
                raise keys.refuse(key, found, f"a {self.name} is supported with {value!r} alone")
        for key in _BESIDE:
            keys.take(key, None)
        if keys:
            key, value = next(iter(keys.items()))
            raise keys.refuse(
                key, value, f"what that changes in a {self.name} isn't known here, so the model isn't read; "
                "if it changes nothing, remove the key",
            )  # fmt: skip
        return self._parse(ours, path)

    def _parse(self, ours: Mapping[str, Any], path: Path) -> ModelConfig:
        try:
            return parse(ModelConfig, _nested(ours), where=str(path))
        except UserError as error:  # under the name that the file has for it
            words = str(error)
            for key, theirs in self.keys.items():
                words = words.replace(f"'{key}'", f"'{theirs}'")
            raise UserError(words) from None


def _implied(key: str, allowed: tuple[Any, ...]) -> bool:
    """Whether `expresses` gives the value of a key of ours, rather than a condition on it."""
    return len(allowed) == 1 and allowed[0] != SET and " " not in key


def _facts(config: ModelConfig) -> dict[str, Any]:
    """Our keys with those of `moe`, and the ratios that some families want to be whole."""
    tree = to_dict(config)
    moe = tree["moe"] or dict.fromkeys(("num_experts", "top_k", "normalize_top_k", "shared_mlp_dim"))
    return {
        **tree,
        **{f"moe.{key}": value for key, value in moe.items()},
        "num_heads / num_kv_heads": config.num_heads // config.num_kv_heads,
        "num_heads x head_dim / embed_dim": config.num_heads * config.head_dim / config.embed_dim,
        "remainder of embed_dim / num_heads": config.embed_dim % config.num_heads,
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {key: value for key, value in flat.items() if "." not in key}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            tree[section] = (tree.get(section) or {}) | {name: value}
    return tree
