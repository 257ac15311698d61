"""The tokenizer of captions: one that is named, or one trained on them; it may keep less of a text."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from clip.data.scenes import Scenes
from clip.data.split import Split
from core.errors import UserError
from llm.tokenizer import Tokenizer, keep, train_bpe

CAPTIONS = 10_000_000  # it is trained on no more than these
_SCENES = 20_000  # examples of the embedded split, which repeat themselves from here on


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


def caption_tokenizer(
    split: Split, cache: Path, *, path: str | None, vocab_size: int, pattern: str, name: str
) -> CaptionTokenizer:
    """The tokenizer at `path`, or one of `vocab_size` trained on the captions of a split.

    A trained one is kept in `cache`, a folder, by what it was made from.

    Args:
        name: what the user knows `vocab_size` by.

    Raises:
        UserError: for a vocabulary that is larger than the captions support, or a tokenizer that has no end
            of text.
    """
    if path is not None:
        return _with_end(path)
    parts = (split.fingerprint, vocab_size, pattern)
    folder = cache / "tokenizers" / hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        keep(folder, train_bpe(_captions(split), vocab_size, pattern, name=name))
    return _with_end(folder)


def _captions(split: Split) -> Iterator[str]:
    count = min(len(split), _SCENES) if isinstance(split, Scenes) else len(split)
    every = (caption for index in range(count) for caption in split.captions(index))
    return itertools.islice(every, CAPTIONS)


def _with_end(path: str | Path) -> CaptionTokenizer:
    tokenizer = CaptionTokenizer.load(path)
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has no end of text, where a caption is read: choose another"
        )
    return tokenizer
