"""A SentencePiece `.model`, such as Llama 2's, as a `tokenizer.json` that gives the same ids.

The ids are SentencePiece's own. Two things that transformers' conversion loses are kept: a space that begins
a text, and that a control symbol or a byte's name written in a text is text. Two that Hugging Face's engine
has no way to do stay as in transformers: a text that begins with a user-defined symbol gets no space before
it, and where spaces are such symbols, more of them than the longest has are cut at other places.
"""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from llm.tokenizer.files import added_token, begin_with, to_config

SPACE = "\u2581"  # what stands for a space in pieces
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The pieces that stand for single bytes: a character that no piece covers falls back to them."""

# Of sentencepiece_model.proto: TrainerSpec.ModelType and SentencePiece.Type.
_MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def convert(path: Path, config: dict) -> tuple[dict, dict]:
    """What stands in `tokenizer.json` and `tokenizer_config.json`.

    Args:
        config: the model's `tokenizer_config.json` where it has one, whose roles go first.

    Raises:
        UserError: for a file that is damaged or no SentencePiece model; for one that loses text it encodes;
            for tokens in `config` that it doesn't have.
    """
    proto = _parse(path)
    pieces = [piece.piece for piece in proto.pieces]
    for token in config.get("added_tokens_decoder", {}).values():
        if token["content"] not in pieces:
            raise UserError(
                f"tokenizer_config.json adds {token['content']!r}, which {path} lacks: save both as one "
                "tokenizer.json with transformers, `AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
            )
    trainer = proto.trainer_spec
    bos, eos, pad, unk = (
        pieces[i] if 0 <= i < len(pieces) else None
        for i in (trainer.bos_id, trainer.eos_id, trainer.pad_id, trainer.unk_id)
    )
    roles = to_config(bos, eos, pad, unk)
    return _tokenizer(proto, bos, unk), roles | config | {"tokenizer_class": roles["tokenizer_class"]}


def _parse(path: Path):
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError:
        raise UserError(
            f"{path}: reading a SentencePiece model needs the extra `data`: pip install -e '.[data]'"
        ) from None
    from google.protobuf.message import DecodeError

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except DecodeError:
        proto.Clear()
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise UserError(
            f"{path} is damaged or no SentencePiece model (Llama 3's is none): copy it anew, "
            "or name the tokenizer.json that comes with it"
        )
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    # Hugging Face's engine would find the control symbols of a unigram model in any text.
    if _MODELS.get(trainer.model_type) != "bpe":
        raise UserError(
            f"{path} is a {_MODELS.get(trainer.model_type)} model: only bpe ones are supported; "
            "train one with model_type='bpe', or with `python -m llm.tokenizer train`"
        )
    missing = set(BYTES) - {piece.piece for piece in proto.pieces if piece.type == _BYTE}
    for lossy, remedy in (
        (bool(missing), "byte_fallback=True"),
        (bool(normalizer.precompiled_charsmap), "normalization_rule_name='identity'"),
        (normalizer.remove_extra_whitespaces, "remove_extra_whitespaces=False"),
        (not normalizer.escape_whitespaces, "escape_whitespaces=True"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix=False"),
        (any(piece.type == _UNUSED for piece in proto.pieces), "no piece marked as unused"),
    ):
        if lossy:
            raise UserError(
                f"{path} is not supported, since text that it encodes can't be told from its ids: "
                f"train it with {remedy}, as Llama 2's was"
            )
    return proto


def _tokenizer(proto, bos: str | None, unk: str | None) -> dict:
    pieces = list(proto.pieces)
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    decoders: list[dict] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    pre_tokenizer = None
    if proto.normalizer_spec.add_dummy_prefix:
        # `Metaspace` puts its sign before a text that doesn't begin with that sign already. Here the sign is
        # a space, and the normalizer has left none: so it always does, and the second replaces that space.
        metaspace = {"type": "Metaspace", "split": False}
        prefix = metaspace | {"replacement": " ", "prepend_scheme": "first"}
        replace = metaspace | {"replacement": SPACE, "prepend_scheme": "never"}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [prefix, replace]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(i, piece.piece, piece.type != _USER_DEFINED)
            for i, piece in enumerate(pieces)
            # One with spaces would have to be found where they are replaced already: it is left to merges.
            if piece.type in (_UNKNOWN, _CONTROL)
            or (piece.type == _USER_DEFINED and SPACE not in piece.piece)
        ],
        "normalizer": _replace(" ", SPACE),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else begin_with(bos, ids[bos]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(proto, ids, unk),
    }


def _replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _bpe(proto, ids: dict[str, int], unk: str | None) -> dict:
    """Merges are every way to make a piece of two others, the best scored piece first."""
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    merges = [
        (-score, ids[piece], piece[:cut], piece[cut:])
        for piece, score in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    merges.sort(key=lambda merge: (*merge[:2], len(merge[2])))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[left, right] for _, _, left, right in merges],
    }
