"""What a family of dual encoders is: its table of tensors, and its `config.json` both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip.model.config import CLIPConfig
from core.config import parse, to_dict
from core.errors import UserError
from export.families.family import Keys
from export.families.table import Row
from llm.tokenizer.files import read

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_TOWER = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "activation": "hidden_act",
}
SECTIONS = {
    "text": _TOWER | {"vocab_size": "vocab_size", "length": "max_position_embeddings"},
    "image": _TOWER | {"size": "image_size", "patch_size": "patch_size"},
}
THEIRS = {"text": "text_config", "image": "vision_config"}
# What a section says besides: of training, of the file, and what every configuration of theirs once held of
# generating text, which no dual encoder does.
_BESIDE = (
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_factor", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "logit_scale_init_value",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "problem_type", "projection_dim", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class DualFamily:
    """One kind of dual encoder in `transformers`.

    Attributes:
        name: its `model_type`.
        architecture: the class of the model.
        table: our parameters, its tensors.
        fixed: the values of ours that it has, by key; other keys may have any.
        defaults: by section, what a key in it means by its absence.
        colours: the `mean` and `std` of pixels where no image processor stands beside the model.
        write: what `config.json` says of `model.embed_dim`: at the top, and in each section.
        read: the same back, of the top's keys and the sections'.
        buffers: a regular expression for tensors that old checkpoints hold beside the parameters.
    """

    name: str
    architecture: str
    table: tuple[Row, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Mapping[str, Any]]
    colours: Mapping[str, Any]
    write: Callable[[int], tuple[dict[str, Any], dict[str, Any]]]
    read: Callable[[Keys, Mapping[str, Keys]], Any]
    buffers: str = r"(text|vision)_model\.embeddings\.position_ids"

    def missing(self, config: CLIPConfig) -> dict[str, str]:
        """What this family would need `config` to be otherwise: by key, in words."""
        tree = to_dict(config)
        facts = {"logit_bias": tree["logit_bias"]} | {
            f"{side}.{key}": value for side in SECTIONS for key, value in tree[side].items()
        }
        return {
            key: f"{key} {str(wanted).lower()} (it is {str(facts[key]).lower()})"
            for key, wanted in self.fixed.items()
            if facts[key] != wanted
        }

    def to_json(self, config: CLIPConfig) -> dict[str, Any]:
        """The `config.json` of a model: what decides its values."""
        tree = to_dict(config)
        top, inside = self.write(config.embed_dim)
        sections: dict[str, Any] = {}
        for side, keys in SECTIONS.items():
            values = {theirs: tree[side][ours] for ours, theirs in keys.items()}
            values["hidden_act"] = ACTIVATIONS[values["hidden_act"]]
            kind = f"{self.name}_{'text' if side == 'text' else 'vision'}_model"
            sections[THEIRS[side]] = {"model_type": kind, **values, **inside}
        sections["vision_config"]["num_channels"] = 3
        return {"architectures": [self.architecture], "model_type": self.name, **top, **sections}

    def from_json(self, data: Mapping[str, Any], path: Path) -> CLIPConfig:
        """The model that a `config.json` describes, and the colours by the processor beside it.

        Raises:
            UserError: for a key that is unknown, or has a value that a model of ours can't have.
        """
        top = Keys(data, path)
        sections = {side: self._section(side, top, path) for side in SECTIONS}
        ours: dict[str, Any] = {"embed_dim": self.read(top, sections), "image": {}, "text": {}}
        for side, keys in SECTIONS.items():
            section = sections[side]
            ours[side] = {key: section.take(theirs, None) for key, theirs in keys.items()}
            ours[side]["activation"] = _activation(section, ours[side]["activation"])
        if (channels := sections["image"].take("num_channels", 3)) != 3:
            raise sections["image"].refuse("num_channels", channels, "images here have 3 colours")
        for key, value in self.fixed.items():
            side, dot, name = key.partition(".")
            ours |= {side: ours[side] | {name: value}} if dot else {key: value}
        for keys_left in (top, *sections.values()):
            for key in _BESIDE:
                keys_left.take(key, None)
            for key, value in keys_left.items():
                raise keys_left.refuse(
                    key, value, f"what that changes in a {self.name} isn't known here, so the model isn't "
                    "read; if it changes nothing, remove the key",
                )  # fmt: skip
        ours["image"] |= dict(self.colours) | read_colours(path.parent)
        return self._parse(ours, path)

    def _section(self, side: str, top: Keys, path: Path) -> Keys:
        """A section with the family's defaults. Old files have it twice, the second time by another name,
        which is then what counts, with what it leaves out at its default (`CLIPConfig.__post_init__`).
        """
        section, again = top.take(THEIRS[side], {}), top.take(f"{THEIRS[side]}_dict", None)
        said = section if again is None else again
        if not isinstance(said, dict):
            raise top.refuse(THEIRS[side], said, "it must hold the keys of that tower")
        return Keys({**self.defaults[side], **{k: v for k, v in said.items() if v is not None}}, path)

    def _parse(self, ours: dict[str, Any], path: Path) -> CLIPConfig:
        try:
            return parse(CLIPConfig, ours, where=str(path))
        except UserError as error:  # under the names that the file has
            words = str(error)
            for side, keys in SECTIONS.items():
                for key, theirs in keys.items():
                    words = words.replace(f"'{side}.{key}'", f"'{THEIRS[side]}.{theirs}'")
            raise UserError(words) from None


def _activation(section: Keys, name: Any) -> str:
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
    if name not in ours:
        raise section.refuse("hidden_act", name, f"supported are {', '.join(ours)}")
    return ours[name]


def processor_json(config: CLIPConfig) -> dict[str, Any]:
    """What `preprocessor_config.json` says: what `clip.data.images.center_crop` and `pixels` do."""
    size = config.image.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(
            ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True
        ),
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "crop_size": {"height": size, "width": size},
        "rescale_factor": 1 / 255,
        "image_mean": list(config.image.mean),
        "image_std": list(config.image.std),
    }


def read_colours(folder: Path) -> dict[str, Any]:
    """`mean` and `std` of the image processor in a folder; nothing where it says nothing."""
    for name in (PREPROCESSOR, PROCESSOR):
        if (folder / name).is_file():
            said = json.loads(read(folder / name))
            said = said.get("image_processor", said)
            names = {"mean": "image_mean", "std": "image_std"}
            return {ours: said[theirs] for ours, theirs in names.items() if said.get(theirs) is not None}
    return {}


def tower(ours: str, theirs: str) -> tuple[Row, ...]:
    """The rows of a tower's blocks."""
    layer, rows = f"{theirs}.encoder.layers.{{layer}}", []
    for name in ("query", "key", "value"):
        at, their = f"{ours}.blocks.attention.{name}", f"{layer}.self_attn.{name[0]}_proj"
        rows += [
            Row(f"{at}.kernel", f"{their}.weight", "d h k -> (h k) d"),
            Row(f"{at}.bias", f"{their}.bias", "h k -> (h k)"),
        ]
    return (
        *rows,
        Row(f"{ours}.blocks.attention.out.kernel", f"{layer}.self_attn.out_proj.weight", "h k d -> d (h k)"),
        Row(f"{ours}.blocks.attention.out.bias", f"{layer}.self_attn.out_proj.bias", "d -> d"),
        *norm(f"{ours}.blocks.attention_norm", f"{layer}.layer_norm1"),
        *mlp(f"{ours}.blocks.mlp", f"{layer}.mlp"),
        *norm(f"{ours}.blocks.mlp_norm", f"{layer}.layer_norm2"),
    )


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.scale", f"{theirs}.weight", "d -> d"),
        Row(f"{ours}.bias", f"{theirs}.bias", "d -> d"),
    )


def mlp(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.up.kernel", f"{theirs}.fc1.weight", "d f -> f d"),
        Row(f"{ours}.up.bias", f"{theirs}.fc1.bias", "f -> f"),
        Row(f"{ours}.down.kernel", f"{theirs}.fc2.weight", "f d -> d f"),
        Row(f"{ours}.down.bias", f"{theirs}.fc2.bias", "d -> d"),
    )
