"""Train a tokenizer: count the words of a corpus, then learn merges from the counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from core.errors import UserError
from llm.tokenizer.bpe import BPE, BYTE_ORDER, SPECIAL_TOKENS, check_special_tokens
from llm.tokenizer.patterns import splitter
from llm.tokenizer.words import count_words


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = "llama3",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    size: int | None = None,
    name: str = "vocab_size",
) -> BPE:
    """Learn a tokenizer from `texts`, which are read once and never held together, under a progress bar.

    The result depends on the texts alone, neither on their order nor on the number of cores. A script that
    calls this needs the usual `if __name__ == "__main__":`, since words are counted in spawned processes.

    Args:
        vocab_size: number of ids: 256 bytes, merges and special tokens together.
        size: bytes of UTF-8 in all texts, if known, so that progress can tell the time left.
        name: what the user knows `vocab_size` by.

    Raises:
        UserError: for a vocabulary that is smaller than bytes and special tokens, or larger than the corpus
            supports; for an empty corpus, an unknown pattern, or a special token that can't be one.
    """
    # Here, for the sake of the processes that count words: they import this package, and need none of it.
    from core.log import in_bytes, progress
    from llm.tokenizer.merges import learn_merges

    splitter(pattern)
    check_special_tokens(special_tokens)
    smallest = len(BYTE_ORDER) + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"{name} ({vocab_size}) is too small: {len(BYTE_ORDER)} bytes and {len(special_tokens)} "
            f"special tokens already make {smallest}"
        )
    with progress("counting words", size, show=in_bytes) as update:
        counts = count_words(texts, pattern, update=update)
    if not counts:
        raise UserError("the corpus is empty: there is no text to learn a tokenizer from")
    with progress("learning merges", vocab_size - smallest) as update:
        merges = learn_merges(counts, vocab_size - smallest, update)
    supported = smallest + len(merges)
    if supported < vocab_size:
        raise UserError(
            f"{name} ({vocab_size}) is larger than this corpus supports: its {len(counts)} distinct "
            f"words make at most {supported} tokens; ask for that, or give more text"
        )
    return BPE(tuple(merges), tuple(special_tokens), pattern)
