"""The tokenizer that all else uses: Hugging Face's engine, over any tokenizer that can encode every byte."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers.models import BPE

from core.errors import UserError
from llm.tokenizer.bpe import BYTE_TO_CHAR
from llm.tokenizer.files import CHAT_TEMPLATE, CONFIG, as_bytes, find, read, write
from llm.tokenizer.sentencepiece import BYTES, SPACE, convert

_PROBE = "A  b\n\té😀"  # case, spaces, and characters that few vocabularies have: what is lost shows here
_UTF8 = {bytes([byte]) for byte in range(256) if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))}


_Kind = TypeVar("_Kind", bound="Tokenizer")  # beartype knows `Self` only where whole classes are checked


class Tokenizer:
    """Text to ids and back. Text is data, never control: no special token is found in it or added to it.

    The engine is told so (`encode_special_tokens`): `<|eot_id|>` written in a document becomes the ids of its
    characters, and only `special_ids` gives the id that ends a turn. (Tokens that another maker added without
    calling them special, such as GPT-NeoX's runs of spaces, are vocabulary and are found.)

    Attributes:
        path: the folder or file it was loaded from.
        fingerprint: hash of `tokenizer.json`; equal fingerprints give equal ids.
        vocab_size: number of ids, special tokens included.
        special_ids: the ids of the special tokens.
        bos_id: begin of text. Like the next two, None where the tokenizer has no such token.
        eos_id: end of text.
        pad_id: padding.
        chat_template: how a conversation is written, Jinja; None where its maker gave none.
    """

    def __init__(self, data: bytes, config: dict, path: Path) -> None:
        """Of the content of `tokenizer.json` and `tokenizer_config.json`. Use `load`."""
        self.path = path
        self._files = data, config
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            self._engine = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the engine raises nothing more precise
            raise UserError(f"the tokenizer in {path} can't be used: {error}") from None
        self.chat_template = _chat_template(config)
        decoder = json.loads(data).get("decoder") or {}
        byte_level = "ByteLevel" in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]
        model = self._engine.model
        self._byte_fallback = not byte_level and isinstance(model, BPE) and model.byte_fallback
        self._engine.encode_special_tokens = True
        self._engine.no_truncation()
        self._engine.no_padding()
        added = self._engine.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        # Ids need not be contiguous in the files of others.
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id, self.pad_id = (
            self._role(role) for role in ("bos_token", "eos_token", "pad_token")
        )
        self._byte_level, self._adds_space = byte_level, False
        self._require_lossless()

    @classmethod
    def load(cls: type[_Kind], path: str | Path) -> _Kind:
        """Read a `tokenizer.json` or a SentencePiece `.model`, or the folder of one.

        The roles of special tokens are those in `tokenizer_config.json` beside it; a `.model` knows its own.

        Raises:
            UserError: if there is none, or it is damaged, or loses text that it encodes.
        """
        file = find(Path(path))
        beside = file.parent / CONFIG
        config = json.loads(read(beside)) if beside.exists() else {}
        if (template := file.parent / CHAT_TEMPLATE).exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
        if file.suffix != ".model":
            return cls(read(file), config, Path(path))
        tokenizer, config = convert(file, config)
        return cls(as_bytes(tokenizer), config, Path(path))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`, whose own are replaced."""
        write(folder, *self._files)

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """The ids of a text; with `markup`, special tokens that it spells are found, which no other reading
        of text does: it is for what a chat template rendered."""
        engine = self._finding_special_tokens if markup else self._engine
        return engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`, with U+FFFD for what isn't UTF-8. Ids that no token has are passed over.

        (transformers decodes byte tokens in runs, of which it loses all where one byte isn't UTF-8.)
        """
        special = set(self.special_ids.values()) if skip_special else ()
        return self.decode_bytes([i for i in ids if i not in special]).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which begin a text."""
        return b"".join(self.token_bytes(i, begins=n == 0) for n, i in enumerate(ids))

    def token_bytes(self, token: int, begins: bool = False) -> bytes:
        """The bytes of one token, maybe part of a character; none for an id that no token has.

        Args:
            begins: whether it begins a text: then it lacks the space that SentencePiece adds to every text.
        """
        found = self._bytes.get(token, b"")
        return found.removeprefix(b" ") if begins and self._adds_space else found

    def id_of(self, text: str) -> int | None:
        """The ordinary token that stands for all of `text` within a longer one; None if there is none."""
        return self._ids.get(text.encode())

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        vocabulary = self._engine.get_vocab(with_added_tokens=False)
        added = self._engine.get_added_tokens_decoder()
        if self._byte_fallback:
            byte = {piece: bytes([i]) for i, piece in enumerate(BYTES)}
            table = {i: byte.get(t) or t.replace(SPACE, " ").encode() for t, i in vocabulary.items()}
        else:
            byte = {char: bytes([byte]) for byte, char in BYTE_TO_CHAR.items()}
            table = {
                i: b"".join(byte[char] for char in token)
                for token, i in vocabulary.items()
                if all(char in byte for char in token)
            }
        return table | {i: token.content.encode() for i, token in added.items()}

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        # A byte that has a piece too is encoded as that.
        fallback = {self._engine.token_to_id(piece) for piece in BYTES} if self._byte_fallback else set()
        ordinary = self._bytes.keys() - set(self.special_ids.values())
        return {self._bytes[i]: i for i in sorted(ordinary, key=lambda i: (i not in fallback, -i))}

    def _require_lossless(self) -> None:
        """A kind of tokenizer that needn't keep a text may do otherwise (`clip.data.tokenizer`)."""
        if not self._byte_level and not self._byte_fallback:
            raise UserError(
                f"the tokenizer in {self.path} ({type(self._engine.model).__name__}) is not supported: only "
                "byte-level BPE and BPE with byte fallback are, to which no text is unknown"
            )
        encoded = b"".join(map(self.token_bytes, self.encode(_PROBE)))
        self._adds_space = encoded == b" " + _PROBE.encode()
        if not self._adds_space and encoded != _PROBE.encode():
            raise UserError(
                f"the tokenizer in {self.path} loses text: its ids of {_PROBE!r} give back {encoded!r}; "
                "choose one that keeps case, spaces and all characters"
            )
        lacking = _UTF8 - set(self._bytes.values())
        if lacking:
            raise UserError(
                f"the tokenizer in {self.path} loses text: no token stands for {len(lacking)} of the bytes "
                f"that UTF-8 has, such as {min(lacking)!r}; choose one that has them all"
            )

    def role_token(self, role: str) -> str | None:
        """The text of the token that has a role, such as `bos_token`; by its text or a description of it."""
        token = self._files[1].get(role)
        return token.get("content") if isinstance(token, dict) else token

    def _role(self, role: str) -> int | None:
        content = self.role_token(role)
        return None if content is None else self._engine.token_to_id(content)

    @functools.cached_property
    def _finding_special_tokens(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        engine.encode_special_tokens = False
        return engine


def _chat_template(config: dict) -> str | None:
    """The template in a `tokenizer_config.json`, the one called default where there are several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template
