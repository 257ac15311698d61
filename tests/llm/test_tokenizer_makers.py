"""Other makers' byte-level tokenizers: the ids of transformers' own classes; what loses text is named."""

from __future__ import annotations

import json
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from core.errors import UserError
from llm.tokenizer import Tokenizer
from llm.tokenizer.files import CONFIG, TOKENIZER
from llm.tokenizer.patterns import PATTERNS

transformers = pytest.importorskip("transformers")

WORLD = "  naïve café 😀👩‍👩‍👧\t東京都 e\u0301 Å שלום ½\n\n\n  x = 12345  <|endoftext|> don't "
CORNERS = [
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    "a",
    "self",
    "123",
    "é",
    "e\u0301",
    "\u212b",
    "😀",
    "東",
    "<|endoftext|>",
]
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(CORNERS), st.text(max_size=3))).map("".join))
END = "<|endoftext|>"


def gpt2(vocab: dict[str, int], merges: list):
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


def gpt_neox(vocab: dict[str, int], merges: list):
    """Runs of spaces are added tokens, though not special ones."""
    tokenizer = transformers.GPTNeoXTokenizer(vocab=vocab, merges=merges, pad_token=None)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (8, 4, 2)])
    return tokenizer


def qwen2(vocab: dict[str, int], merges: list):
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def llama3(vocab: dict[str, int], merges: list):
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS["llama3"]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = ("<|begin_of_text|>", engine.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    engine.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token=begin[0], eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="module")
def learned() -> tuple[dict[str, int], list]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([path.read_text(encoding="utf-8") for path in files], trainer)
    model = json.loads(engine.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module", params=[gpt2, gpt_neox, qwen2, llama3])
def pair(request, learned, tmp_path_factory):
    """A tokenizer of transformers, and ours from the folder that it saves."""
    theirs = request.param(*learned)
    folder = tmp_path_factory.mktemp("makers")
    theirs.save_pretrained(folder)
    return theirs, Tokenizer.load(folder)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text=WORLD)
@example(text="")
def test_ids_and_texts_equal_those_of_transformers(pair, text):
    theirs, ours = pair
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.decode(ids) == theirs.decode(ids)
    composes = theirs.backend_tokenizer.normalizer is not None
    assert ours.decode_bytes(ids).decode() == (unicodedata.normalize("NFC", text) if composes else text)
    assert not set(ids) & set(ours.special_ids.values())


def test_roles_equal_those_of_transformers(pair):
    theirs, ours = pair
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == roles
    assert ours.vocab_size == len(theirs)


def test_special_tokens_in_a_text_are_text_unlike_transformers_by_default(pair):
    theirs, ours = pair
    end = theirs.eos_token
    assert theirs(f"a{end}", add_special_tokens=False).input_ids == [*ours.encode("a"), ours.eos_id]
    assert ours.encode(f"a{end}")[-1] != ours.eos_id


# Tokenizers that are refused


def byte_level(without: str = "", **parts) -> tokenizers.Tokenizer:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    engine = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(engine, name, part)
    return engine


def word_piece() -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    engine.decoder = decoders.WordPiece()
    return engine


REFUSED: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "WordPiece": (word_piece, r"\(WordPiece\) is not supported"),
    "Unigram": (
        lambda: tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=True)),
        r"\(Unigram\) is not supported",
    ),
    "BPE without bytes": (
        lambda: tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")),
        r"\(BPE\) is not supported: only byte-level BPE",
    ),
    "bytes that are missing": (
        lambda: tokenizers.Tokenizer(
            models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True)
        ),
        "loses text: its ids of 'A  b",
    ),
    "some bytes that are missing": (
        lambda: byte_level(without="æ"),  # the stand-in of 0xe6, with which most of CJK begins
        r"loses text: no token stands for 1 of the bytes that UTF-8 has, such as b'\\xe6'",
    ),
    "lower case": (lambda: byte_level(normalizer=normalizers.Lowercase()), "loses text"),
    "spaces": (lambda: byte_level(normalizer=normalizers.Replace(tokenizers.Regex(" +"), " ")), "loses text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_loses_text_is_refused(name, tmp_path):
    make, message = REFUSED[name]
    make().save(str(tmp_path / TOKENIZER))
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_space_put_before_every_text_is_not_counted(tmp_path):
    byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)).save(str(tmp_path / TOKENIZER))
    (tmp_path / CONFIG).write_text("{}")
    loaded = Tokenizer.load(tmp_path)
    ids = loaded.encode("ab")
    assert len(ids) == 3 and loaded.decode(ids) == "ab"
    assert [loaded.token_bytes(ids[0], begins) for begins in (True, False)] == [b"", b" "]
