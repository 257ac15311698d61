"""`python -m llm.generate` on a run that training made, and text as it streams."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tiny import copy_corpus, experiment

from core.config import load
from core.errors import UserError
from llm import generate
from llm.config import Experiment
from llm.generate import TextDecoder, encode_prompt, sample_texts, text_of, token_id
from llm.loop import train
from llm.model.transformer import blueprint
from llm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("generate")
    corpus = copy_corpus(tmp_path_factory.mktemp("corpus"))
    sections = {"train": {"steps": 2}, "model": {"max_length": 64, "tied_head": False}}
    sections |= {"eval": {"every": 0, "batches": 1}, "checkpoint": {"every": 1, "keep": 2}}
    train(experiment(corpus, folder, **sections))
    return folder / "run"


@pytest.fixture
def command(trained, monkeypatch, capsys):
    """Calls the command in this process; its two outputs as text."""
    monkeypatch.setattr(generate.devices, "prepare", lambda: None)  # JAX is imported already

    def call(*arguments: str, run: Path = trained) -> tuple[str, str]:
        generate.main(["--run", str(run), *arguments])
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


def test_json(command, trained):
    prompts = ["def ", "é", "def "]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    settings = ("--max-new-tokens", "9", "--temperature", "1", "--seed", "3", "--json")
    out, _ = command(*arguments, *settings)
    answers = [json.loads(line) for line in out.splitlines()]
    tokenizer = Tokenizer.load(trained / "tokenizer")
    assert [answer["prompt"] for answer in answers] == prompts
    for answer in answers:
        ids = answer["prompt_token_ids"]
        assert ids == [tokenizer.bos_id, *tokenizer.encode(answer["prompt"])]
        assert 1 <= len(answer["token_ids"]) == len(answer["log_probabilities"]) <= 9
        assert answer["text"] == tokenizer.decode(answer["token_ids"], skip_special=True)
        assert max(answer["log_probabilities"]) < 0
    assert answers[0]["token_ids"] != answers[2]["token_ids"]  # equal prompts, each in its own way
    alone, _ = command(
        "--prompt", "é", "--max-new-tokens", "9", "--temperature", "1", "--seed", "3", "--json"
    )
    assert json.loads(alone)["token_ids"] == answers[1]["token_ids"]
    assert_allclose(json.loads(alone)["log_probabilities"], answers[1]["log_probabilities"], rtol=1e-4)


def test_text_is_what_json_says(command):
    arguments = ("--prompt", "def ", "--prompt", "class ", "--max-new-tokens", "40", "--temperature", "2")
    answers = [json.loads(line) for line in command(*arguments, "--json")[0].splitlines()]
    out, err = command(*arguments)
    first, second = (answer["prompt"] + answer["text"] for answer in answers)
    assert out == f"{first}\n\n---\n{second}\n"
    assert "step 2" in err and "tokens in" in err


def test_generation_stops_at_the_end_of_text(trained):
    """An untrained head may be anything: here one that always says end of text."""
    config = load(Experiment, trained / "config.yaml").model
    tokenizer = Tokenizer.load(trained / "tokenizer")
    params = jax.tree.map(np.array, blueprint(config).init(jax.random.key(0)))
    params["norm"]["scale"][:] = 0
    assert sample_texts(config, params, tokenizer, ["a"], 5, temperature=0.0) == [tokenizer.decode([0] * 5)]
    params["blocks"] = jax.tree.map(np.zeros_like, params["blocks"])
    params["embedding"][:], params["norm"]["scale"][:] = 1, 1
    params["head"][tokenizer.eos_id] = 100
    assert sample_texts(config, params, tokenizer, ["a", "b"], 5) == ["", ""]


def test_a_stop_token_ends_the_text(command, trained):
    settings = [word for prompt in ("def ", "é", "def ") for word in ("--prompt", prompt)]
    settings += ["--max-new-tokens", "30", "--temperature", "2", "--json"]
    rows = [json.loads(line)["token_ids"] for line in command(*settings)[0].splitlines()]
    tokenizer = Tokenizer.load(trained / "tokenizer")
    text = lambda i: text_of(tokenizer, [i])  # noqa: E731
    stop = next(i for ids in rows for i in ids[:-1] if text(i) and tokenizer.encode(text(i)) == [i])
    stopped = [json.loads(line) for line in command(*settings, "--stop", text(stop))[0].splitlines()]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in rows]
    assert [answer["token_ids"] for answer in stopped] == expected != rows
    assert [token_id(tokenizer, name) for name in tokenizer.special_ids] == [*tokenizer.special_ids.values()]


def test_samples_end_with_the_context(trained):
    config = load(Experiment, trained / "config.yaml").model
    tokenizer = Tokenizer.load(trained / "tokenizer")
    params = blueprint(config).init(jax.random.key(0))
    texts = sample_texts(config, params, tokenizer, ["def f(x):", "x"], 1000)
    assert len(texts) == 2 and all(texts)
    with pytest.raises(UserError, match=r"model.max_length \(64\)"):
        sample_texts(config, params, tokenizer, ["x = 1\n" * 50], 8)


def test_a_damaged_checkpoint_is_passed_over(command, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = max(
        (run / "checkpoints" / "2" / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    _, err = command("--prompt", "def ", "--max-new-tokens", "2", run=run)
    err = " ".join(err.split())  # the console wraps lines, where depends on the folder's name
    assert "checkpoint 2 is damaged" in err and "step 1" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "caf\udce9"], r"--prompt is not UTF-8 at byte 3 \(0xe9\)"),
        (["--prompt", "a", "--seed", "10000000000"], "--seed 10000000000: choose one from 0 to 4294967295"),
        (["--prompt", "a", "--stop", "a a"], r"--stop 'a a' is not one token but \['a',"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-p", "1.5"], "top-p is 1.5"),
        (["--prompt", "a", "--max-new-tokens", "100"], r"2 tokens and 100 new ones.*\(64\)"),
    ],
)
def test_mistakes_are_named(command, arguments, named):
    with pytest.raises(UserError, match=named):
        command(*arguments)


def test_runs_without_checkpoints_are_named(command, trained, tmp_path):
    with pytest.raises(UserError, match=r"runn holds no run .* did you mean .*/run\?"):
        command("--prompt", "a", run=trained.parent / "runn")
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="no checkpoint yet"):
        command("--prompt", "a", run=run)


def test_mistakes_and_help_need_no_jax(tmp_path):
    code = "import sys, llm.generate; assert not {'jax', 'flax', 'orbax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    arguments = ["-m", "llm.generate", "--run", str(tmp_path / "none"), "--prompt", "a"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "holds no run" in done.stderr


def test_a_prompt_begins_as_documents_do_where_no_token_begins_a_text(trained):
    tokenizer = Tokenizer.load(trained / "tokenizer")
    tokenizer.bos_id = None
    assert encode_prompt(tokenizer, "def ") == [tokenizer.eos_id, *tokenizer.encode("def ")]


@given(text=st.text())
def test_streamed_characters_are_whole(text, trained):
    tokenizer = Tokenizer.load(trained / "tokenizer")
    decoder, ids = TextDecoder(tokenizer), encode_prompt(tokenizer, text)
    pieces = [decoder.add([i]) for i in ids]
    assert "".join(pieces) == text and decoder.end() == ""


def test_bytes_that_never_become_a_character(trained):
    tokenizer = Tokenizer.load(trained / "tokenizer")
    ids = tokenizer.encode("ok 🙂")[:-1]
    assert tokenizer.bos_id is not None
    decoder = TextDecoder(tokenizer)
    assert decoder.add(ids) == "ok " and decoder.end() == "\ufffd"
    assert text_of(tokenizer, [tokenizer.bos_id, *ids]) == "ok \ufffd"
