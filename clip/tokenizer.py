"""Tokenizers for captions: those of the language model, and others that keep less of a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from llm.tokenizer import Tokenizer


class CaptionTokenizer(Tokenizer):
    """A tokenizer whose ids a text tower reads, and nobody reads back.

    So, unlike the language model's, it may lose text: CLIP's own drops case and spaces, SigLIP's what its
    vocabulary lacks. Where its maker's template puts something before a text and the end of text after it, as
    CLIP's does, what comes before is among the ids; the end is for `encode_captions` to add. (A language
    model's begin of text, with no end, isn't: nothing is put before captions of tokenizers trained here.)
    """

    def _require_lossless(self) -> None:
        pass

    def encode(self, text: str, markup: bool = False) -> list[int]:
        return self._before + super().encode(text, markup)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._before + ids for ids in super().encode_batch(texts)]

    @cached_property
    def _before(self) -> list[int]:
        around = self._engine.encode("", add_special_tokens=True).ids
        return around[:-1] if around and around[-1] == self.eos_id else []
