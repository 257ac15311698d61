"""The tokenizer that all else uses: Hugging Face's engine, over any byte-level `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from core.errors import UserError
from llm.tokenizer.bpe import BYTE_TO_CHAR
from llm.tokenizer.files import CONFIG, TOKENIZER, read


class Tokenizer:
    """Text to ids and back. Text is data, never control: no special token is found in it or added to it.

    The engine is told so (`encode_special_tokens`): `<|eot_id|>` written in a document becomes the ids of its
    characters, and only `special_ids` gives the id that ends a turn. (Tokens that another maker added without
    calling them special, such as GPT-NeoX's runs of spaces, are vocabulary and are found.)

    Attributes:
        folder: where it was loaded from.
        fingerprint: hash of `tokenizer.json`; equal fingerprints give equal ids.
        vocab_size: number of ids, special tokens included.
        special_ids: the ids of the special tokens.
        bos_id: begin of text. Like the next two, None where the tokenizer has no such token.
        eos_id: end of text.
        pad_id: padding.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        data = read(self.folder / TOKENIZER)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        decoder = json.loads(data).get("decoder") or {}
        if "ByteLevel" not in [d.get("type") for d in (decoder, *decoder.get("decoders", ()))]:
            raise UserError(
                f"{self.folder / TOKENIZER} is not byte-level: only byte-level BPE tokenizers are supported"
            )
        try:
            self._engine = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the engine raises nothing more precise
            raise UserError(f"{self.folder / TOKENIZER} can't be used: {error}") from None
        self._engine.encode_special_tokens = True
        self._engine.no_truncation()
        self._engine.no_padding()
        added = self._engine.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        # Ids need not be contiguous in the files of others.
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values())
        config = json.loads(read(self.folder / CONFIG)) if (self.folder / CONFIG).exists() else {}
        self.bos_id, self.eos_id, self.pad_id = (
            self._role(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, for the roles of special tokens, `tokenizer_config.json`.

        Raises:
            UserError: if there is none, or it is damaged or not byte-level.
        """
        return cls(folder)

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`, with U+FFFD for what isn't UTF-8. Ids that no token has are passed over."""
        return self._engine.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, maybe part of a character; none for an id that no token has."""
        return self._bytes.get(token, b"")

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        byte = {char: bytes([byte]) for byte, char in BYTE_TO_CHAR.items()}
        table = {
            i: b"".join(byte[char] for char in token)
            for token, i in self._engine.get_vocab(with_added_tokens=False).items()
            if all(char in byte for char in token)
        }
        added = self._engine.get_added_tokens_decoder()
        return table | {i: token.content.encode() for i, token in added.items()}

    def _role(self, token: str | dict | None) -> int | None:
        """The id of a token as a config names it: by its text, or by a description of it."""
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self._engine.token_to_id(content)
