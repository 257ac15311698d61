"""Learning merges, against the `tokenizers` trainer and against one that recounts everything each time."""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from core.errors import UserError
from llm.tokenizer import BPE, train_bpe
from llm.tokenizer import merges as merges_module
from llm.tokenizer import words as words_module
from llm.tokenizer.bpe import BYTE_ORDER, BYTE_TO_CHAR, merge_piece
from llm.tokenizer.merges import learn_merges
from llm.tokenizer.patterns import PATTERNS
from llm.tokenizer.words import count_words

FEW_LETTERS = st.dictionaries(st.text("ab", min_size=1, max_size=14), st.integers(1, 9), max_size=12)


def stdlib_sources(size: int) -> list[str]:
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        texts.append(path.read_text(encoding="utf-8"))
        size -= len(texts[-1])
        if size < 0:
            break
    return texts


def reference_merges(texts: list[str], vocab_size: int, pattern: str) -> list[tuple[str, str]]:
    """The merges of the `tokenizers` trainer, in its spelling."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(texts, trainer)
    model = json.loads(engine.to_str())["model"]
    return [tuple(pair) for pair in model["merges"]]


def spelled(bpe: BPE) -> list[tuple[str, str]]:
    def spell(token: int) -> str:
        return "".join(BYTE_TO_CHAR[byte] for byte in bpe.vocabulary[token])

    return [(spell(left), spell(right)) for left, right in bpe.merges]


def naive_merges(counts: dict[str, int], limit: int) -> list[tuple[int, int]]:
    """Byte-pair encoding as it is defined: count all pairs, merge the first of the most frequent, repeat."""
    words = [([BYTE_ORDER.index(byte) for byte in word.encode()], n) for word, n in counts.items()]
    merges: list[tuple[int, int]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [256 + len(merges)]
                at += 1
        merges.append(best)
    return merges


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_equal_the_reference_trainer_on_source_code(pattern):
    texts = stdlib_sources(1_500_000)
    bpe = train_bpe(texts, 4096, pattern, special_tokens=())
    assert spelled(bpe) == reference_merges(texts, 4096, pattern)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab é\n", max_size=30), min_size=1, max_size=8), st.sampled_from(list(PATTERNS)))
def test_merges_equal_the_reference_trainer_down_to_the_last_tie(texts, pattern):
    merges = learn_merges(count_words(texts, pattern), 1000)
    assert spelled(BPE(tuple(merges), (), pattern)) == reference_merges(texts, 1256, pattern)


@settings(max_examples=300, deadline=None)
@given(FEW_LETTERS, st.integers(0, 40), st.sampled_from([1, 3, 4096]))
def test_incremental_counts_equal_recounting(counts, limit, refill):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merges_module, "_REFILL", refill)
        assert learn_merges(counts, limit) == naive_merges(counts, limit)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13])
def test_overlapping_runs_are_merged_from_the_left(length):
    counts = {"a" * length: 1, "b" + "a" * (length + 1): 2}
    assert learn_merges(counts, 100) == naive_merges(counts, 100)


@settings(max_examples=200, deadline=None)
@given(FEW_LETTERS)
def test_each_merge_makes_a_new_token_that_encodes_to_itself(counts):
    bpe = BPE(tuple(learn_merges(counts, 1000)), ())
    assert len(set(bpe.vocabulary)) == len(bpe.vocabulary)
    merged = {pair: 256 + rank for rank, pair in enumerate(bpe.merges)}
    for i, token in enumerate(bpe.vocabulary):
        assert merge_piece([BYTE_ORDER.index(byte) for byte in token], merged) == [i]


def test_words_are_counted_alike_by_any_number_of_processes_in_any_order(monkeypatch):
    monkeypatch.setattr(words_module, "BATCH", 30_000)
    texts = stdlib_sources(200_000)
    alone = count_words(texts, "llama3", processes=1)
    assert sum(alone.values()) > 30_000
    shared = count_words(reversed(texts), "llama3", processes=2)
    assert shared == alone
    assert learn_merges(shared, 300) == learn_merges(alone, 300)


def test_a_long_text_is_cut_without_changing_a_word(monkeypatch):
    text = "\n".join(stdlib_sources(200_000))
    whole = {pattern: count_words([text], pattern, processes=1) for pattern in PATTERNS}
    monkeypatch.setattr(words_module, "BATCH", 1000)
    assert len(list(words_module._parts(text))) > 100
    for pattern, counts in whole.items():
        assert count_words([text], pattern, processes=1) == counts


def test_memory_grows_with_distinct_words_and_not_with_the_text(monkeypatch):
    monkeypatch.setattr(words_module, "BATCH", 100_000)
    text = "\n".join(stdlib_sources(100_000))[:100_000]

    def peak(repeats: int) -> tuple[int, Counter]:
        copies = (text[:-1] + text[-1] for _ in range(repeats))  # a new object each time
        tracemalloc.start()
        counts = count_words(copies, "llama3", processes=1)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used, counts

    count_words([text], "llama3", processes=1)  # compiles the patterns
    once, words = peak(2)
    often, more_words = peak(20)
    assert more_words == Counter({word: 10 * n for word, n in words.items()})
    assert often < 1.1 * once


def test_a_vocabulary_larger_than_the_corpus_supports_is_told_with_the_largest_that_it_does():
    texts = ["low lower lowest", "new newer newest"]
    with pytest.raises(UserError, match=r"vocab_size \(500\) .* at most (\d+) tokens") as raised:
        train_bpe(texts, 500)
    largest = int(str(raised.value).split("at most ")[1].split()[0])
    assert train_bpe(texts, largest).vocab_size == largest
    with pytest.raises(UserError, match="larger than this corpus supports"):
        train_bpe(texts, largest + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "corpus is empty"),
        ({"texts": ["", ""]}, "corpus is empty"),
        (
            {"vocab_size": 261},
            "(261) is too small: 256 bytes and 6 special tokens already make 262",
        ),
        ({"pattern": "gpt9"}, "unknown split pattern 'gpt9'; valid: gpt2, llama3"),
        ({"special_tokens": ("<|a|>", "<|a|>")}, "'<|a|>' stands twice"),
        ({"special_tokens": ("",)}, "special token is empty"),
        ({"special_tokens": ("a",)}, "'a' is an ordinary token too"),
    ],
)
def test_what_cannot_be_trained_is_named(options, message):
    with pytest.raises(UserError) as raised:
        train_bpe(**{"texts": ["some text"], "vocab_size": 264} | options)
    assert message in str(raised.value)


def test_vocabulary_is_bytes_then_merges_then_special_tokens():
    bpe = train_bpe(["aaaa bbbb " * 9], 264)
    assert bpe.vocab_size == 264
    assert sorted(bpe.vocabulary[:256]) == [bytes([byte]) for byte in range(256)]
    assert bpe.vocabulary[256:] == tuple(
        bpe.vocabulary[left] + bpe.vocabulary[right] for left, right in bpe.merges
    )
    assert list(bpe.special_ids.values()) == list(range(258, 264))


def test_the_order_of_words_does_not_matter():
    counts = dict(count_words(stdlib_sources(100_000), "gpt2"))
    shuffled = random.Random(0).sample(list(counts.items()), len(counts))
    assert learn_merges(dict(shuffled), 500) == learn_merges(counts, 500)
