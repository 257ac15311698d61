"""A tokenizer on disk, as Hugging Face writes it: `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

from core.errors import UserError
from core.files import write_atomically
from llm.tokenizer.bpe import BEGIN, BPE, BYTE_TO_CHAR, END, PAD
from llm.tokenizer.patterns import PATTERNS

TOKENIZER, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
CHAT_TEMPLATE = "chat_template.jinja"  # where newer versions of transformers keep it


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
    write(folder, as_bytes(to_json(bpe)), to_config(BEGIN, END, PAD))


def keep(folder: Path, bpe: BPE) -> None:
    """`save` into a new folder, there whole or not at all; one that another process has made stays."""
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        save(bpe, unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else it trained the same at the same time, and was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(folder: Path, tokenizer: bytes, config: dict) -> None:
    """Write both files into `folder`, whose own are replaced; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    write_atomically(folder / TOKENIZER, tokenizer)


def as_bytes(tokenizer: dict) -> bytes:
    """The content of a `tokenizer.json`."""
    return (json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n").encode()


def find(path: Path) -> Path:
    """The file that holds a tokenizer: `path`, or in that folder `tokenizer.json` or `tokenizer.model`.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return path
    for name in (TOKENIZER, SENTENCEPIECE):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"there is no tokenizer in {path} (neither {TOKENIZER} nor {SENTENCEPIECE}): "
        "train one with `python -m llm.tokenizer train`"
    )


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
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    try:
        if not isinstance(json.loads(data), dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; copy it anew or train the tokenizer again") from None
    return data


def to_json(bpe: BPE) -> dict:
    """What stands in `tokenizer.json`: the same splitting, merges and ids, for Hugging Face's engine."""
    tokens = ["".join(BYTE_TO_CHAR[byte] for byte in token) for token in bpe.vocabulary]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, token) for token, i in bpe.special_ids.items()],
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
        "post_processor": begin_with(BEGIN, bpe.special_ids[BEGIN]),
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


def added_token(i: int, content: str, special: bool = True) -> dict:
    """A token that the engine finds in a text as it is written, before anything else looks at it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special}


def begin_with(token: str, i: int) -> dict:
    """Where special tokens are asked for, one begin-of-text stands in front, as in Llama 3's tokenizer.

    None stands between the two texts of a pair.
    """
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def to_config(bos: str | None, eos: str | None, pad: str | None, unk: str | None = None) -> dict:
    """What stands in `tokenizer_config.json`: the roles of special tokens, all else being elsewhere."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # how Hugging Face writes that the tokenizer knows no limit
    }
