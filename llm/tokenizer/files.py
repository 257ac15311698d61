"""A tokenizer on disk, as Hugging Face writes it: `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path

from core.errors import UserError
from core.files import write_atomically
from llm.tokenizer.bpe import BEGIN, BPE, BYTE_TO_CHAR, END, PAD
from llm.tokenizer.patterns import PATTERNS

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def save(bpe: BPE, folder: str | Path) -> None:
    """Write both files into `folder`; once `tokenizer.json` is there, the tokenizer is complete.

    Raises:
        UserError: if the folder holds a tokenizer already, or `bpe` lacks a token that marks the begin or
            the end of a text or fills a batch.
    """
    folder = Path(folder)
    refuse_existing(folder)
    for token in (BEGIN, END, PAD):
        if token not in bpe.special_tokens:
            raise UserError(f"the special token {token} is missing: keep {', '.join((BEGIN, END, PAD))}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # how Hugging Face writes that the tokenizer knows no limit
    }
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomically(folder / TOKENIZER, json.dumps(to_json(bpe), ensure_ascii=False, indent=1) + "\n")


def copy(source: Path, folder: Path) -> None:
    """Copy a tokenizer into `folder`, whose own is replaced; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, TOKENIZER):
        if (source / name).exists():
            write_atomically(folder / name, read(source / name))
        else:
            (folder / name).unlink(missing_ok=True)


def refuse_existing(folder: Path) -> None:
    """Raise a `UserError` if `folder` holds a tokenizer or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the tokenizer")
    if (folder / TOKENIZER).exists():
        raise UserError(f"{folder} already holds a tokenizer: name another folder, or remove that one")


def read(path: Path) -> bytes:
    """The bytes of a JSON file that holds one object; a `UserError` for any other."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"there is no tokenizer in {path.parent} ({path.name} is missing): "
            "train one with `python -m llm.tokenizer train`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    try:
        if not isinstance(json.loads(data), dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; copy it anew or train the tokenizer again") from None
    return data


def to_json(bpe: BPE) -> dict:
    """What stands in `tokenizer.json`: the same splitting, merges and ids, for Hugging Face's engine.

    Where special tokens are asked for, one begin-of-text is put in front, as Llama 3's tokenizer does, and
    none between the two texts of a pair.
    """
    tokens = ["".join(BYTE_TO_CHAR[byte] for byte in token) for token in bpe.vocabulary]
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, i in bpe.special_ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERNS[bpe.pattern]},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [bpe.special_ids[BEGIN]], "tokens": [BEGIN]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [[tokens[left], tokens[right]] for left, right in bpe.merges],
        },
    }
