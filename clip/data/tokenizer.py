"""The tokenizer of captions: one that is named, or one trained on the captions."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from clip.data.scenes import Scenes
from clip.data.split import Split
from core.errors import UserError
from llm.tokenizer import Tokenizer, save, train_bpe

CAPTIONS = 10_000_000  # it is trained on no more than these
_SCENES = 20_000  # examples of the embedded split, which repeat themselves from here on


def caption_tokenizer(
    split: Split, cache: Path, *, path: str | None, vocab_size: int, pattern: str, name: str
) -> Tokenizer:
    """The tokenizer at `path`, or one of `vocab_size` trained on the captions of a split.

    A trained one is kept in `cache`, a folder, by what it was made from.

    Args:
        name: what the user knows `vocab_size` by.

    Raises:
        UserError: for a vocabulary that is larger than the captions support, or a tokenizer that has no end
            of text.
    """
    if path is not None:
        return _with_end(Tokenizer.load(path))
    parts = (split.fingerprint, vocab_size, pattern)
    folder = cache / "tokenizers" / hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        bpe = train_bpe(_captions(split), vocab_size, pattern, name=name)
        unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        try:
            save(bpe, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process trained the same at the same time, and was first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return _with_end(Tokenizer.load(folder))


def _captions(split: Split) -> Iterator[str]:
    count = min(len(split), _SCENES) if isinstance(split, Scenes) else len(split)
    every = (caption for index in range(count) for caption in split.captions(index))
    return itertools.islice(every, CAPTIONS)


def _with_end(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has no end of text, where a caption is read: choose another"
        )
    return tokenizer
