"""Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019): the tokenizer and its encoder.

Ids: the 256 bytes (printable ones first, as `BYTE_ORDER` says), then the tokens that merges make, in the
order they were learned, then the special tokens. So a byte or a merge keeps its id whatever special tokens
follow.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from core.errors import UserError
from llm.tokenizer.patterns import splitter

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_ORDER = bytes((*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE))))
"""The byte with id i is BYTE_ORDER[i]: GPT-2's order, the printable bytes first."""

BYTE_TO_CHAR = {
    byte: chr(byte) if i < len(_PRINTABLE) else chr(256 + i - len(_PRINTABLE))
    for i, byte in enumerate(BYTE_ORDER)
}
"""GPT-2's printable stand-in for each byte, in which tokens are written to `tokenizer.json`."""


@dataclass(frozen=True)
class BPE:
    """A tokenizer is its merges: all else follows from them.

    Args:
        merges: pairs of ids, the earliest learned first.
        special_tokens: strings with ids of their own, which no ordinary text ever becomes.
        pattern: a name in `llm.tokenizer.patterns.PATTERNS`.

    Raises:
        UserError: for an unknown pattern, merges that make a token twice, or a special token that is empty,
            repeated or an ordinary token.
    """

    merges: tuple[tuple[int, int], ...]
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    pattern: str = "llama3"

    def __post_init__(self) -> None:
        splitter(self.pattern)
        check_special_tokens(self.special_tokens)
        ordinary = set(self.vocabulary)
        if len(ordinary) < len(self.vocabulary):
            raise UserError("two merges make the same token: these are not the merges of one training")
        for token in self.special_tokens:
            if token.encode() in ordinary:
                raise UserError(
                    f"the special token {token!r} is an ordinary token too: choose another, like <|{token}|>"
                )

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary) + len(self.special_tokens)

    @cached_property
    def vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of each ordinary token, by id."""
        tokens = [bytes([byte]) for byte in BYTE_ORDER]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return tuple(tokens)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        return {token: len(self.vocabulary) + i for i, token in enumerate(self.special_tokens)}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in it are plain text, unless `special`."""
        if not special or not self.special_tokens:
            return [i for piece in splitter(self.pattern)(text) for i in self._encode_piece(piece)]
        ids: list[int] = []
        for part in self._special_splitter.split(text):
            ids += [self.special_ids[part]] if part in self.special_ids else self.encode(part)
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; those that aren't UTF-8 are split as if they were symbols."""
        return self.encode(data.decode("utf-8", "surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; U+FFFD stands where their bytes aren't UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`: exactly those that were encoded."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"{i} is no token id: this tokenizer's are 0 to {self.vocab_size - 1}")
        return b"".join(map(self._token_bytes.__getitem__, ids))

    @cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        return self.vocabulary + tuple(token.encode() for token in self.special_tokens)

    @cached_property
    def _special_splitter(self) -> re.Pattern:
        # The longest first, where one begins another.
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _merged(self) -> dict[tuple[int, int], int]:
        """The id that each pair merges into. Ids rise in the order of learning."""
        return {pair: len(BYTE_ORDER) + rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def _encode_piece(self) -> Callable[[str], list[int]]:
        # Most pieces of a text are words seen before.
        byte_id = {byte: i for i, byte in enumerate(BYTE_ORDER)}

        @lru_cache(maxsize=2**17)
        def encode_piece(piece: str) -> list[int]:
            ids = [byte_id[byte] for byte in piece.encode("utf-8", "surrogateescape")]
            return merge_piece(ids, self._merged)

        return encode_piece


def check_special_tokens(tokens: Sequence[str]) -> None:
    """Raise a `UserError` for a special token that is empty or stands twice."""
    if "" in tokens:
        raise UserError("a special token is empty: give each a name, such as <|end_of_text|>")
    for token in tokens:
        if tokens.count(token) > 1:
            raise UserError(f"the special token {token!r} stands twice: remove one")


def merge_piece(ids: list[int], merged: Mapping[tuple[int, int], int]) -> list[int]:
    """Merge, again and again, the earliest learned pair in `ids`, the leftmost of equals. Consumes `ids`.

    A heap of candidate pairs over a linked list: n log n for n ids, so that a megabyte without a space is no
    trap.

    Args:
        merged: the id that each pair merges into, the smaller the earlier learned.
    """
    size = len(ids)
    following = list(range(1, size + 1))
    preceding = list(range(-1, size - 1))
    heap = [(merged[pair], at, pair) for at, pair in enumerate(pairwise(ids)) if pair in merged]
    heapq.heapify(heap)
    while heap:
        token, at, pair = heapq.heappop(heap)
        right = following[at]
        # A candidate is stale once either side of it has been merged away.
        if right == size or (ids[at], ids[right]) != pair:
            continue
        ids[at], ids[right] = token, -1
        after, before = following[right], preceding[at]
        following[at] = after
        if after < size:
            preceding[after] = at
            if (pair := (token, ids[after])) in merged:
                heapq.heappush(heap, (merged[pair], at, pair))
        if before >= 0 and (pair := (ids[before], token)) in merged:
            heapq.heappush(heap, (merged[pair], before, pair))
    return [i for i in ids if i >= 0]
