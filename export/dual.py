"""What is particular to dual encoders: the files beside their weights, and the run that an import makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from clip.config import Experiment
from clip.data.captions import encode_captions
from clip.data.tokenizer import CaptionTokenizer
from clip.model.config import CLIPConfig
from core.config import parse, to_dict
from core.errors import UserError
from core.run import RunFolder
from export.families.dual import PREPROCESSOR, DualFamily, processor_json
from export.folder import write_json
from llm.tokenizer.files import CONFIG, TOKENIZER

_PROBE = "Two dogs, and a red ball!"
_LEGACY_END = 2  # in a CLIP's configuration it makes transformers pool at the largest id, whatever that is


def write_files(family: DualFamily, config: CLIPConfig, run: RunFolder, dtype: str, folder: Path) -> None:
    """Write `config.json`, the image processor and the tokenizer.

    Raises:
        UserError: for a tokenizer whose end of text transformers would not find.
    """
    tokenizer = read_tokenizer(run.tokenizer)
    if config.text.pool == "end" and tokenizer.eos_id == _LEGACY_END:
        raise UserError(
            f"the end of text has the id {_LEGACY_END} in {run.tokenizer}, which in a CLIP's config.json "
            "means that texts end at their largest id: train with a tokenizer that gives it another id to "
            "export it"
        )
    said = family.to_json(config)
    # Padding is the end of text; transformers' own value for it would be of another vocabulary.
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    said["text_config"] |= ids
    write_json(folder / "config.json", said | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / PREPROCESSOR, processor_json(config))
    tokenizer.save(folder)
    end = tokenizer.role_token("eos_token")
    assert end is not None
    content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    if not _ends_captions(tokenizer, content):
        content["post_processor"] = _end_with(end, tokenizer.eos_id)
        write_json(folder / TOKENIZER, content)
    roles = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    padding = {"pad_token": end, "model_max_length": config.text.length}
    write_json(folder / CONFIG, roles | padding)


def read_tokenizer(folder: Path) -> CaptionTokenizer:
    """Raises `UserError` where there is none, or no token ends a text."""
    if not (folder / TOKENIZER).is_file() and (folder / "spiece.model").is_file():
        raise UserError(
            f"{folder} has its tokenizer as spiece.model alone: add the {TOKENIZER} that belongs to the model"
        )
    tokenizer = CaptionTokenizer.load(folder)
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no end of text (eos_token in {CONFIG}): name one there"
        )
    return tokenizer


def require_padding(tokenizer: CaptionTokenizer, config: CLIPConfig) -> None:
    """Raise `UserError` if a model that came with its tokenizer reads padding that `encode_captions` doesn't
    write.
    """
    if config.text.pool == "last" and tokenizer.pad_id not in (None, tokenizer.eos_id):
        raise UserError(
            f"the tokenizer in {tokenizer.path} fills texts up with another token than the one that ends "
            "them, and the model reads the last one: captions here are filled up with the end"
        )


def experiment(config: CLIPConfig, out: Path) -> Experiment:
    """What an imported model trains with unless told otherwise: gently, on the data that is at hand."""
    return parse(
        Experiment,
        {
            "run": {"name": out.name, "dir": str(out.parent)},
            "data": {"batch_size": 64},
            "tokenizer": {"path": str(out / "tokenizer")},
            "model": to_dict(config),
            "train": {
                "steps": 1000,
                "remat": "dots",
                "scan_layers": False,
                "loss": "sigmoid" if config.logit_bias else "softmax",
            },
            "optimizer": {"learning_rate": 1e-5, "warmup_steps": 50, "beta2": 0.98, "epsilon": 1e-6},
            "eval": {"every": 200},
            "checkpoint": {"every": 200},
        },
    )


def _ends_captions(tokenizer: CaptionTokenizer, content: dict[str, Any]) -> bool:
    """Whether transformers, asked for special tokens, gives what `encode_captions` does."""
    engine = tokenizers.Tokenizer.from_str(json.dumps(content))
    rows, ends = encode_captions(tokenizer, [_PROBE], 100)
    return engine.encode(_PROBE, add_special_tokens=True).ids == rows[0, : ends[0] + 1].tolist()


def _end_with(token: str, i: int | None) -> dict[str, Any]:
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, end, other, end],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
