"""SentencePiece models: the ids of SentencePiece and of transformers, no byte lost, and a run from one."""

from __future__ import annotations

import importlib
import io
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import copy_corpus, experiment
from tokenizers import normalizers

import llm.report
from core.errors import UserError
from core.metrics import read_metrics
from llm import generate
from llm.data.corpus import open_corpus
from llm.generate import TextDecoder, encode_prompt, text_of, token_id
from llm.loop import train
from llm.prepare import prepare, token_bytes
from llm.tokenizer import Tokenizer
from llm.tokenizer.__main__ import main
from llm.tokenizer.files import CONFIG, TOKENIZER

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

LLAMA2 = {
    "model_type": "bpe",
    "vocab_size": 1000,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
}
SPACE = "\u2581"
GEMMA = {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["<turn>", "\n\n", *(SPACE * n for n in range(2, 32))],
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
}
WORLD = "  naïve café 😀👩‍👩‍👧\t東京都 e\u0301 שלום\n\n\nreturn 12345  <s>x</s> <0x0A><unk> <turn> "
CORNERS = ["a", "the", "self.", " ", "  ", "    ", "\n", "\n\n", "\t", "\0", "\u2581", "12", "é", "e\u0301"]
CORNERS += [
    "😀",
    "東京",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<eos>",
    "<0x0A>",
    "<0xFF>",
    "<turn>",
    "import os\n",
]
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(CORNERS), st.text(max_size=3))).map("".join))


def train_model(**options) -> bytes:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **(LLAMA2 | options)
    )
    return model.getvalue()


class Both:
    """A model as SentencePiece reads it, and as we do."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder, self.path = folder, folder / "tokenizer.model"
        self.path.write_bytes(train_model(**options))
        self.theirs = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.ours = Tokenizer.load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Both:
    return Both(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=[{}, GEMMA], ids=["llama2", "gemma"])
def both(request, tmp_path_factory) -> Both:
    return Both(tmp_path_factory.mktemp("model"), **request.param)


def test_ids_and_roles_are_those_of_the_model(both):
    ours, theirs = both.ours, both.theirs
    assert ours.vocab_size == theirs.vocab_size() == 1000
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert ours.pad_id == (None if theirs.pad_id() < 0 else theirs.pad_id())
    special = {i for i in range(1000) if theirs.is_control(i) or theirs.is_unknown(i)}
    assert ours.special_ids == {theirs.id_to_piece(i): i for i in special}


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
@example(text=WORLD)
@example(text="")
@example(text="x" * 5000)
def test_ids_equal_sentencepiece_s_and_no_byte_is_lost(both, text):
    assume(SPACE * 32 not in text.replace(" ", SPACE))  # more than any piece has: see below
    ids = both.ours.encode(text)
    assert ids == both.theirs.encode(text) == both.ours.encode_batch(["", text])[1]
    assert not set(ids) & set(both.ours.special_ids.values())
    if SPACE not in text:  # which no SentencePiece model tells from a space
        assert both.ours.decode(ids) == both.theirs.decode(ids) == text
        assert both.ours.decode_bytes(ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_the_bytes_of_ids_add_up_to_the_text(both, text):
    assume(SPACE not in text)
    document = [both.ours.bos_id, *both.ours.encode(text), both.ours.eos_id]
    lengths = token_bytes(both.ours, 1024)
    begins = (lengths[0][document[:-1]] == 0).astype(int)
    assert lengths[begins, document[1:]].sum() == len(text.encode())


def test_the_symbols_of_users_are_found_as_transformers_finds_them(tmp_path):
    """Before all else: a text that begins with one has no space put before it, unlike SentencePiece's."""
    model = Both(tmp_path, user_defined_symbols=["<turn>"])
    for text in ("a <turn>b<turn> c", " <turn>", "x<turn>"):
        assert model.ours.encode(text) == model.theirs.encode(text)
    text = "<turn>b <turn>"
    ids, theirs = model.ours.encode(text), model.theirs.encode(text)
    assert [model.theirs.piece_to_id(SPACE), *ids] == theirs
    hugging_face = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert ids == hugging_face(text, add_special_tokens=False).input_ids
    assert model.ours.decode(ids) == model.theirs.decode(theirs) == text


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text=WORLD.strip())
def test_ids_equal_llama_s_in_transformers(llama, hugging_face, text):
    """But for a text that begins with a space, which transformers 5 takes for the space it adds itself."""
    assume(not text.startswith((" ", SPACE)))
    ids = hugging_face(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert llama.ours.encode(text) == ids
    if SPACE not in text:
        assert llama.ours.decode(ids) == hugging_face.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text=WORLD)
@example(text=" " * 100 + "x")
def test_ids_equal_gemma_s_in_transformers(gemma, text):
    """Also where more spaces stand together than any piece has, which SentencePiece cuts elsewhere."""
    ours, theirs = gemma
    ids = ours.encode(text)
    if SPACE * 2 not in text:  # of which transformers makes a token that is not for spaces
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if SPACE not in text:
        assert ours.decode(ids) == theirs.decode(ids) == text


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    model = Both(tmp_path_factory.mktemp("gemma"), **GEMMA)
    return model.ours, transformers.GemmaTokenizer.from_pretrained(model.folder)


@pytest.fixture(scope="module")
def hugging_face(llama):
    return transformers.LlamaTokenizer.from_pretrained(llama.folder)


def test_where_transformers_differs(llama, hugging_face):
    ids = lambda text: hugging_face(text, add_special_tokens=False).input_ids  # noqa: E731
    assert ids(" a") == ids("a") == llama.ours.encode("a") != llama.ours.encode(" a")
    assert ids("x</s>") == [*llama.ours.encode("x"), llama.ours.eos_id] != llama.ours.encode("x</s>")


@pytest.fixture(scope="module", params=["legacy", "saved"])
def published(request, llama, hugging_face, tmp_path_factory) -> Tokenizer:
    """A `tokenizer.json` of others: as Llama 2's is, the `legacy` way; or as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("published")
    if request.param == "saved":
        hugging_face.save_pretrained(folder)
        return Tokenizer.load(folder)
    engine = tokenizers.Tokenizer.from_str(hugging_face.backend_tokenizer.to_str())
    engine.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    engine.pre_tokenizer = None
    engine.save(str(folder / TOKENIZER))
    (folder / CONFIG).write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    return Tokenizer.load(folder / TOKENIZER)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text=WORLD)
def test_a_published_tokenizer_json_gives_the_same_ids(llama, published, text):
    if published.path.is_dir() and text.startswith((" ", SPACE)):
        return  # the space that transformers 5 loses
    ids = published.encode(text)
    assert ids == llama.ours.encode(text)
    assert published.decode(ids) == llama.ours.decode(ids)
    assert (published.bos_id, published.eos_id, published.special_ids) == (1, 2, llama.ours.special_ids)


def test_transformers_reads_what_is_saved(both, tmp_path):
    both.ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == both.ours.fingerprint
    hugging_face = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = both.ours.encode(WORLD)
    assert hugging_face(WORLD, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert hugging_face(WORLD, split_special_tokens=True).input_ids == [again.bos_id, *ids]
    assert hugging_face.decode(ids) == WORLD
    roles = (hugging_face.bos_token_id, hugging_face.eos_token_id, hugging_face.pad_token_id)
    assert roles == (again.bos_id, again.eos_id, again.pad_id)
    assert len(hugging_face) == again.vocab_size
    assert hugging_face.unk_token_id == both.theirs.unk_id()


def test_the_command_imports_a_model(llama, tmp_path, capfdbinary):
    main(["import", "--model", str(llama.path), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [TOKENIZER, CONFIG]
    for place in (llama.path, llama.folder, tmp_path / "out", tmp_path / "out" / TOKENIZER):
        capfdbinary.readouterr()
        main(["encode", "--tokenizer", str(place), WORLD])
        ids = capfdbinary.readouterr().out.decode().split()
        assert [*map(int, ids)] == llama.theirs.encode(WORLD)
        main(["decode", "--tokenizer", str(place), *ids])
        assert capfdbinary.readouterr().out == WORLD.encode()
    main(["inspect", "--tokenizer", str(llama.path)])
    shown = capfdbinary.readouterr().out.decode()
    assert "1000 ids" in shown and "begin of text" in shown and "·default" in shown
    with pytest.raises(UserError, match="already holds a tokenizer"):
        main(["import", "--model", str(llama.path), "--out", str(tmp_path / "out")])


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS, text=TEXTS, data=st.data())
def test_text_that_streams_goes_on_with_the_prompt(both, prompt, text, data):
    """A continuation keeps the space it begins with, and any cut of it into pieces gives the same text."""
    assume(SPACE not in prompt + text and prompt)
    given_ids, new = encode_prompt(both.ours, prompt), both.ours.encode(text)
    decoder = TextDecoder(both.ours)
    pieces = [decoder.add([i]) for i in new]
    assert "".join(pieces) + decoder.end() == text_of(both.ours, new)
    whole = both.ours.decode([*given_ids, *new], skip_special=True)
    assert whole == prompt + text_of(both.ours, new)
    cut = data.draw(st.integers(0, len(new)))
    decoder = TextDecoder(both.ours)
    assert decoder.add(new[:cut]) + decoder.add(new[cut:]) + decoder.end() == text_of(both.ours, new)


def test_bytes_that_never_become_a_character(both):
    ids = both.ours.encode("ok 😀")[:-1]
    assert both.ours.decode(ids) == "ok \ufffd"
    decoder = TextDecoder(both.ours)
    assert decoder.add(ids).strip() == "ok" and decoder.end() == "\ufffd"


def test_a_stop_token_is_one_within_a_text(both):
    for text in ("\n", ".", " de", "the", "<unk>", "\t"):
        i = token_id(both.ours, text)
        assert both.ours.token_bytes(i) == text.encode()
    assert both.theirs.is_byte(token_id(both.ours, "\n")) and not both.theirs.is_byte(
        token_id(both.ours, ".")
    )
    with pytest.raises(UserError, match=r"--stop '東' is not one token"):
        token_id(both.ours, "東")


# A run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


def tiny(corpus: Path, runs: Path, path: Path, **changes: dict):
    sections: dict[str, dict] = {"model": {"vocab_size": 1024, "max_length": 64}, "train": {"steps": 2}}
    sections |= {"eval": {"every": 0, "prompts": ["def f"]}, "tokenizer": {"path": str(path)}}
    return experiment(corpus, runs, **(sections | changes))


@pytest.fixture(scope="module")
def trained(llama, corpus, tmp_path_factory) -> tuple[Path, bytes]:
    """A run, and the held-out bytes that its baselines were given."""
    runs = tmp_path_factory.mktemp("runs")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        whole = llm.report.baselines
        patch.setattr(
            llm.report, "baselines", lambda heldout, *rest: seen.append(heldout) or whole(heldout, *rest)
        )
        train(tiny(corpus, runs, llama.path))
    return runs / "run", seen[0]


def test_a_run_counts_the_bytes_of_its_text(llama, corpus, trained):
    run, seen = trained
    documents = [d.text for d in open_corpus([f"{corpus}/*.py"]).documents("heldout")]
    assert seen == "".join(documents).encode()
    metrics = read_metrics(run / "metrics.jsonl")[-1]
    tokens = sum(len(llama.ours.encode(text)) + 1 for text in documents)
    nats = metrics["heldout_loss"] * tokens
    assert metrics["heldout_bits_per_byte"] == pytest.approx(nats / np.log(2) / len(seen), rel=1e-5)
    assert (run / "samples.md").read_text(encoding="utf-8").count("\n    def f") == 1


def test_a_run_keeps_its_tokenizer_and_generates(llama, trained, monkeypatch, capsys):
    run, _ = trained
    assert sorted(path.name for path in (run / "tokenizer").iterdir()) == [TOKENIZER, CONFIG]
    kept = Tokenizer.load(run / "tokenizer")
    assert kept.fingerprint == llama.ours.fingerprint
    monkeypatch.setattr(generate.devices, "prepare", lambda: None)  # JAX is imported already
    arguments = ["--run", str(run), "--prompt", "def f", "--max-new-tokens", "20", "--temperature", "2"]
    generate.main([*arguments, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_token_ids"] == [1, *llama.theirs.encode("def f")]
    whole = kept.decode([*answer["prompt_token_ids"], *answer["token_ids"]], skip_special=True)
    assert answer["prompt"] + answer["text"] == whole
    generate.main(arguments)
    assert capsys.readouterr().out == whole + "\n"


def test_weights_go_on_with_their_own_tokenizer(llama, corpus, trained, tmp_path):
    run, _ = trained
    start = {"init": {"from": str(run)}}
    same = prepare(tiny(corpus, tmp_path, llama.path, **start))
    assert same.tokenizer.fingerprint == llama.ours.fingerprint
    other = Both(tmp_path, vocab_size=600)
    with pytest.raises(UserError, match=r"tokenizer\.path: .*tokenizer\.model is not the tokenizer of init"):
        prepare(tiny(corpus, tmp_path, other.path, **start))


def test_more_ids_than_the_model_has_are_named(llama, corpus, tmp_path):
    with pytest.raises(UserError, match=r"has 1000 tokens, more than model\.vocab_size \(512\)"):
        prepare(tiny(corpus, tmp_path, llama.path, model={"vocab_size": 512}))


def test_a_size_for_a_tokenizer_that_stands_is_refused(llama, corpus, tmp_path):
    options = {"path": str(llama.path), "vocab_size": 512}
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is for a tokenizer to train"):
        tiny(corpus, tmp_path, llama.path, tokenizer=options)


# Bad input


def edited(model: bytes, edit) -> bytes:
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(model)
    edit(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: b"", "is damaged or no SentencePiece model"),
        (lambda model: model[: len(model) // 2], "is damaged or no SentencePiece model"),
        (lambda model: b"IQ== 0\nIg== 1\n", r"no SentencePiece model \(Llama 3's is none\)"),
        (lambda model: train_model(model_type="unigram", vocab_size=400), "is a unigram model: only bpe"),
        (
            lambda model: train_model(model_type="char", vocab_size=400, hard_vocab_limit=False),
            "a char model",
        ),
        (lambda model: train_model(byte_fallback=False), "train it with byte_fallback=True"),
        (lambda model: train_model(normalization_rule_name="nmt_nfkc"), "normalization_rule_name='identity'"),
        (lambda model: train_model(remove_extra_whitespaces=True), "remove_extra_whitespaces=False"),
        (lambda model: train_model(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix=False"),
        (
            lambda model: edited(model, lambda proto: setattr(proto.pieces[-1], "type", 5)),
            "no piece marked as unused",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_named(llama, tmp_path, damage, message):
    path = tmp_path / "other.model"
    path.write_bytes(damage(llama.path.read_bytes()))
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value)


def test_the_config_beside_a_model_names_roles_but_adds_no_tokens(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama.path.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<unk>", "chat_template": "{{ x }}"}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"added_tokens_decoder": {"1": {"content": "<s>"}}}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)
    loaded.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (saved["tokenizer_class"], saved["chat_template"]) == ("PreTrainedTokenizerFast", "{{ x }}")
    (tmp_path / CONFIG).write_text(json.dumps({"added_tokens_decoder": {"1000": {"content": "<|im_end|>"}}}))
    with pytest.raises(UserError, match=r"adds '<\|im_end\|>', which .* lacks: .* tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_the_extra_that_is_missing_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(UserError, match=r"needs the extra `data`: pip install -e '\.\[data\]'"):
        Tokenizer.load(llama.path)
