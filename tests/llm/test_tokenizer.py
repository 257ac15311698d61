"""Encoding: from scratch, by Hugging Face's engine and through `transformers`, on any text and any bytes."""

from __future__ import annotations

import itertools
import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.errors import UserError
from llm.tokenizer import BPE, SPECIAL_TOKENS, Tokenizer, save, train_bpe
from llm.tokenizer.bpe import merge_piece
from llm.tokenizer.files import CONFIG, TOKENIZER
from llm.tokenizer.patterns import PATTERNS, cut_before, splitter

WORLD = (
    "naïve café 😀👩‍👩‍👧 Zürich 東京都は日本の首都 Привет, мир! שלום مرحبا ١٢٣ ½ Ⅷ "
    "e\u0301 \u2028\u3000\xa0 don't DON'T "
)
# What the patterns treat in ways of their own, among them letters that only the newest Unicode knows.
CORNERS = ["'s", "'LL", "'ſ", "\r\n", "\n\n", "  ", "\t", "\x1c", "\x85", "\u3000", "\u088f", "\U000323b0"]
CORNERS += [
    "\U00012550",
    "\u0301",
    "\uffff",
    "123",
    "٣",
    "abc",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|",
    "|>",
]
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(CORNERS), st.text(max_size=3))).map("".join))


class Pair:
    """A tokenizer of both kinds, as trained and as loaded from the files."""

    def __init__(self, pattern: str, folder: Path) -> None:
        texts = [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))]
        self.bpe = train_bpe([*texts, WORLD * 20], 1500, pattern)
        save(self.bpe, folder)
        self.folder = folder
        self.engine = Tokenizer.load(folder)


@pytest.fixture(scope="module", params=list(PATTERNS))
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.mark.parametrize(
    ("pattern", "end"),
    [
        ("llama3", 0x20000),
        pytest.param("llama3", 0x110000, marks=pytest.mark.slow),
        pytest.param("gpt2", 0x110000, marks=pytest.mark.slow),
    ],
)
def test_every_character_is_split_as_the_engine_does(pattern, end):
    """Letter, numeral, space or symbol: what joins `a`, and what joins `1`, tells."""
    engine = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    codes = itertools.chain(range(0xD800), range(0xE000, end))
    text = "".join(f"a{c}1{c}" for c in map(chr, codes))
    assert splitter(pattern)(text) == [piece for piece, _ in engine.pre_tokenize_str(text)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(PATTERNS)), TEXTS, st.integers(0, 20))
def test_a_cut_changes_no_piece(pattern, text, end):
    split, cut = splitter(pattern), cut_before(text, end)
    assert 0 <= cut <= max(end, 0)
    assert split(text[:cut]) + split(text[cut:]) == split(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text=WORLD)
@example(text="x" * 5000)
def test_ids_equal_the_engine_s_and_round_trip(pair, text):
    ids = pair.bpe.encode(text)
    assert ids == pair.engine.encode(text)
    assert pair.bpe.decode(ids) == pair.engine.decode(ids) == text
    assert b"".join(map(pair.engine.token_bytes, ids)) == text.encode()
    assert not set(ids) & set(pair.bpe.special_ids.values())


@settings(max_examples=200, deadline=None)
@given(data=st.binary())
@example(data=bytes(range(256)))
@example(data=b"caf\xc3\xa9 \xc3( \xed\xa0\x80 \xff\xfe a\xf0\x9f\x98")
def test_any_bytes_round_trip(pair, data):
    ids = pair.bpe.encode_bytes(data)
    assert pair.bpe.decode_bytes(ids) == data
    assert b"".join(map(pair.engine.token_bytes, ids)) == data


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_decode_alike(pair, data):
    ids = data.draw(st.lists(st.integers(0, pair.bpe.vocab_size - 1), max_size=20))
    assert pair.bpe.decode(ids) == pair.engine.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_special_tokens_in_text_are_found_only_when_asked_for(pair, text):
    engine = tokenizers.Tokenizer.from_file(str(pair.folder / TOKENIZER))
    assert pair.bpe.encode(text, special=True) == engine.encode(text, add_special_tokens=False).ids


def test_batches_give_the_ids_of_single_texts(pair):
    texts = [WORLD, "", "def f(x): return x", "<|eot_id|>"]
    assert [list(ids) for ids in pair.engine.encode_batch(texts)] == [pair.bpe.encode(text) for text in texts]


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=40), st.permutations(range(6)))
def test_merging_takes_the_earliest_pair_and_the_leftmost_of_equals(text, order):
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (1, 2)]
    merged = {pairs[which]: 2 + rank for rank, which in enumerate(order)}
    ids = ["ab".index(letter) for letter in text]
    expected = list(ids)
    while found := [(merged[p], at) for at, p in enumerate(itertools.pairwise(expected)) if p in merged]:
        token, at = min(found)
        expected[at : at + 2] = [token]
    assert merge_piece(ids, merged) == expected


def test_a_long_text_without_a_space_is_encoded(pair):
    text = "ab" * 50_000
    ids = pair.bpe.encode(text)
    assert len(ids) <= len(text) and pair.bpe.decode(ids) == text


def test_files_read_back_as_the_same_tokenizer(pair, tmp_path):
    save(pair.bpe, tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.fingerprint == pair.engine.fingerprint
    other = BPE(pair.bpe.merges[:-1], pair.bpe.special_tokens, pair.bpe.pattern)
    save(other, tmp_path / "other")
    assert Tokenizer.load(tmp_path / "other").fingerprint != again.fingerprint


def test_the_engine_knows_sizes_and_roles(pair):
    assert pair.engine.vocab_size == pair.bpe.vocab_size == 1500
    assert pair.engine.special_ids == pair.bpe.special_ids
    roles = (pair.engine.bos_id, pair.engine.eos_id, pair.engine.pad_id)
    assert roles == tuple(pair.bpe.special_ids[token] for token in SPECIAL_TOKENS[:3])
    assert pair.engine.token_bytes(roles[0]) == b"<|begin_of_text|>"
    assert pair.engine.token_bytes(10**6) == b""
    ids = [roles[0], *pair.engine.encode("hi"), roles[1]]
    assert pair.engine.decode(ids) == "<|begin_of_text|>hi<|end_of_text|>"
    assert pair.engine.decode(ids, skip_special=True) == "hi"


def test_transformers_reads_the_folder(pair):
    transformers = pytest.importorskip("transformers")
    hugging_face = transformers.AutoTokenizer.from_pretrained(pair.folder)
    ids = pair.bpe.encode(WORLD)
    assert hugging_face(WORLD, add_special_tokens=False).input_ids == ids
    assert hugging_face(WORLD).input_ids == [pair.engine.bos_id, *ids]
    assert hugging_face("a", "b").input_ids.count(pair.engine.bos_id) == 1
    assert hugging_face.decode(ids) == WORLD
    assert hugging_face.decode([pair.engine.bos_id, *ids], skip_special_tokens=True) == WORLD
    assert len(hugging_face) == pair.bpe.vocab_size
    roles = (hugging_face.bos_token_id, hugging_face.eos_token_id, hugging_face.pad_token_id)
    assert roles == (pair.engine.bos_id, pair.engine.eos_id, pair.engine.pad_id)


def test_special_tokens_that_begin_alike_are_told_apart():
    bpe = BPE((), ("<|a|>", "<|a|><|b|>"))
    assert bpe.encode("<|a|><|b|><|a|>", special=True) == [257, 256]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no tokenizer in"),
        ({TOKENIZER: "{"}, "is damaged"),
        ({TOKENIZER: "[]"}, "is damaged"),
        ({TOKENIZER: "{}"}, "can't be used"),
        ({TOKENIZER: '{"decoder": {"type": "ByteLevel"}}'}, "can't be used"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_roles_may_be_described_rather_than_named(pair, tmp_path):
    (tmp_path / TOKENIZER).write_bytes((pair.folder / TOKENIZER).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}, "pad_token": None}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.pad_id) == (pair.bpe.special_ids["<|eot_id|>"], None)


def test_saving_never_overwrites(pair, tmp_path):
    with pytest.raises(UserError, match="already holds a tokenizer"):
        save(pair.bpe, pair.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save(pair.bpe, tmp_path / "file")
    with pytest.raises(UserError, match=r"<\|begin_of_text\|> is missing"):
        save(BPE((), ("<|end_of_text|>",)), tmp_path / "new")


@pytest.mark.parametrize("ids", [[-1], [1500], [0, 10**9]])
def test_an_id_that_no_token_has_is_named(pair, ids):
    with pytest.raises(UserError, match=f"{ids[-1]} is no token id: this tokenizer's are 0 to 1499"):
        pair.bpe.decode(ids)


def test_merges_of_no_training_are_refused():
    with pytest.raises(UserError, match="two merges make the same token"):
        BPE(((0, 1), (0, 1)), ())


def test_a_byte_level_tokenizer_of_another_make_is_read(tmp_path):
    """GPT-2's shape: the special token has the first id and stands in the vocabulary too."""
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.Sequence([decoders.ByteLevel()])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        [WORLD],
        trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    engine.save(str(tmp_path / TOKENIZER))
    (tmp_path / CONFIG).write_text('{"eos_token": "<|endoftext|>"}')
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id, loaded.bos_id) == (280, 0, None)
    text = WORLD + "<|endoftext|>"
    ids = loaded.encode(text)
    assert 0 not in ids and loaded.decode(ids) == text
    assert b"".join(map(loaded.token_bytes, [*ids, 0])) == text.encode() + b"<|endoftext|>"
