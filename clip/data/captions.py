"""Captions as ids of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from clip.data.split import Split
from llm.tokenizer import Tokenizer

COUNTED = 10_000  # images whose captions `count_cut` looks at, at most


def encode_captions(
    tokenizer: Tokenizer, captions: Sequence[str], length: int
) -> tuple[Int32[np.ndarray, "B {length}"], Int32[np.ndarray, " B"]]:
    """Captions, or prompts, as the text tower reads them.

    A row is the ids of a caption, of which `length` - 1 are kept, then the end of text up to `length`. What
    comes after its first end of text is padding, which a causal tower that is read there never sees.

    Returns:
        The rows, and where in each the first end of text stands.
    """
    assert tokenizer.eos_id is not None  # `caption_tokenizer` sees to it
    tokens = np.full((len(captions), length), tokenizer.eos_id, np.int32)
    ends = np.zeros(len(captions), np.int32)
    for row, ids in enumerate(tokenizer.encode_batch(captions)):
        kept = ids[: length - 1]
        tokens[row, : len(kept)] = kept
        ends[row] = len(kept)
    return tokens, ends


def count_cut(split: Split, tokenizer: Tokenizer, length: int) -> tuple[int, int, int]:
    """How many captions lose their end at that length, of how many looked at, and the longest's tokens.

    The length of a row counts its end of text. Of a large split images at equal distances are looked at.
    """
    apart = -(-len(split) // COUNTED)
    captions = [caption for index in range(0, len(split), apart) for caption in split.captions(index)]
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(captions)]
    return sum(n > length for n in lengths), len(lengths), max(lengths)
