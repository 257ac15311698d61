"""What `python -m llm.inspect` shows, against Hugging Face's own captures, and the command on a tiny run."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import CASES, VOCAB, make
from numpy.testing import assert_allclose, assert_array_equal
from test_model_parity import LENGTH, tokens
from tiny import copy_corpus, experiment

from core.config import load
from core.errors import UserError
from export.read import read_params
from llm.config import Experiment
from llm.inspect import __main__ as command_line
from llm.inspect.labels import token_labels
from llm.inspect.lens import head_figures, inspect, log_probabilities, right_guesses
from llm.loop import train
from llm.model.transformer import blueprint
from llm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MODELS = ("llama", "mistral-window")


@functools.cache
def both(name: str):
    """Our inspection of a text, Hugging Face's output for it, and their logit lens [L, S, V]."""
    config, model = CASES[name][0], make(name)
    with torch.no_grad():
        ids = tokens()[0]
        theirs = model(torch.tensor(ids[None]), output_attentions=True, output_hidden_states=True)
        lens = [model.lm_head(model.model.norm(x[0])) for x in theirs.hidden_states[1:-1]]
        lens = torch.log_softmax(torch.stack([*lens, theirs.logits[0]]), -1).numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params = read_params(Path(folder), blueprint(config).shapes)
    return config, params, ids, inspect(config, params, ids.tolist(), likeliest=5), theirs, lens


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_hugging_faces_and_causal(name):
    config, _, _, ours, theirs, _ = both(name)
    assert ours.attention.shape == (config.num_layers, config.num_heads, LENGTH, LENGTH)
    assert_allclose(ours.attention, torch.cat(theirs.attentions).numpy(), atol=1e-5)
    assert_allclose(ours.attention.sum(-1), 1, atol=1e-5)
    query, key = np.indices((LENGTH, LENGTH))
    unseen = key > query
    if config.window is not None:
        unseen |= query - key >= config.window
    assert (ours.attention[..., unseen] == 0).all() and (ours.attention[..., ~unseen] > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_lens_are_hugging_faces(name):
    config, params, ids, ours, theirs, lens = both(name)
    model, batch = blueprint(config).bind(params), jnp.asarray(ids, jnp.int32)[None]
    output = model(batch, jnp.arange(LENGTH)[None], jnp.ones_like(batch), capture=True)
    hidden = output.aux["hidden"]
    # Theirs are the embedding, then each block's output, but for the last after the final norm.
    for mine, other in zip([*hidden[:-1], output.hidden], theirs.hidden_states[1:], strict=True):
        assert_allclose(mine, other.numpy(), atol=1e-4)
    for mine, other in zip(hidden, lens, strict=True):
        assert_allclose(log_probabilities(model, mine)[0], other, atol=1e-4)
    assert_array_equal(ours.lens_tokens, lens.argmax(-1))
    assert_allclose(ours.lens_probabilities, np.exp(lens.max(-1)), rtol=1e-4)
    final = jax.nn.log_softmax(model.logits(output.hidden))
    assert_allclose(log_probabilities(model, hidden[-1]), final, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_next_tokens_and_surprisal_are_hugging_faces(name):
    _, _, ids, ours, theirs, lens = both(name)
    assert_array_equal(ours.next_tokens, np.argsort(-lens[-1])[:, :5])
    assert_allclose(ours.next_probabilities, -np.sort(-np.exp(lens[-1]))[:, :5], rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(theirs.logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
    assert_allclose(ours.surprisal.sum(), loss.item(), rtol=1e-5)
    right = right_guesses(ours)
    assert_array_equal(right[:, :-1], lens.argmax(-1)[:, :-1] == ids[1:])
    assert not right[:, -1].any()


def test_head_figures_by_hand():
    previous = np.eye(4, k=-1)
    previous[0, 0] = 1
    even = np.tri(4) / np.arange(1, 5)[:, None]
    figures = head_figures(np.stack([previous, even])[None])
    assert_allclose(figures.previous, [[1, (1 / 2 + 1 / 3 + 1 / 4) / 3]])
    assert_allclose(figures.first, [[1 / 3, (1 / 2 + 1 / 3 + 1 / 4) / 3]])
    assert_allclose(figures.itself, [[0, (1 / 2 + 1 / 3 + 1 / 4) / 3]])
    assert_allclose(figures.entropy, [[0, np.log([2, 3, 4]).mean()]])


def test_more_next_tokens_than_positions():
    config, params, ids, *_ = both("llama")
    assert_allclose(inspect(config, params, ids[:2].tolist(), VOCAB).next_probabilities.sum(-1), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    corpus = copy_corpus(tmp_path_factory.mktemp("corpus"))
    sections = {"train": {"steps": 2}, "eval": {"every": 0, "batches": 1}, "model": {"max_length": 64}}
    runs = tmp_path_factory.mktemp("inspect")
    train(experiment(corpus, runs, **sections))
    return runs / "run"


@pytest.fixture
def command(trained, monkeypatch, capsys):
    """Calls the command in this process; what it printed."""
    monkeypatch.setattr(command_line.devices, "prepare", lambda: None)  # JAX is imported already

    def call(*arguments: str) -> str:
        command_line.main(["--run", str(trained), *arguments])
        return capsys.readouterr().out

    return call


def test_the_command_draws_every_picture(command, trained, tmp_path):
    out = tmp_path / "deep" / "plots"
    printed = command("--prompt", "def é(_$x$): 漢", "--top-k", "3", "--out", str(out))
    names = ["heads", "attention-layer-0", "attention-layer-1", "next-token", "logit-lens", "surprisal"]
    assert [line for line in printed.splitlines() if line.endswith(".png")] == [
        str(out / f"{name}.png") for name in names
    ]
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(printed.splitlines()) == 1 + 3 + len(names)
    command("--prompt", "x")
    assert (trained / "plots" / "logit-lens.png").exists()


def test_labels_are_short_and_printable(trained):
    tokenizer = Tokenizer.load(trained / "tokenizer")
    assert token_labels(tokenizer, tokenizer.encode(" \n")) == ["·", "\\n"]
    assert token_labels(tokenizer, [tokenizer.bos_id, 10**6], longest=6) == ["<|beg…", "[1000…"]
    assert all(label.isprintable() for label in token_labels(tokenizer, range(tokenizer.vocab_size)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 at byte 3"),
        (["--prompt", "x", "--top-k", "0"], r"--top-k 0: choose a number from 1 to model.vocab_size \(300\)"),
        (["--prompt", "x", "--top-k", "301"], "--top-k 301"),
        (["--prompt", "漢" * 40], "--prompt has 121 tokens .* 64 is model.max_length: give a shorter text"),
        (["--prompt", "x", "--out", __file__], "can't be made: .* name another with --out"),
    ],
)
def test_mistakes_are_named(command, arguments, named):
    with pytest.raises(UserError, match=named):
        command(*arguments)


def test_a_text_longer_than_the_pictures_is_named(trained):
    model = load(Experiment, trained / "config.yaml", ["model.max_length=1000"]).model
    command_line._check(command_line.LONGEST, 10, model)
    with pytest.raises(UserError, match=r"129 tokens .* 128 is the most that the pictures can show"):
        command_line._check(command_line.LONGEST + 1, 10, model)


def test_mistakes_and_help_need_no_jax(tmp_path):
    code = "import sys, llm.inspect.__main__; assert not {'jax', 'flax', 'orbax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    arguments = ["-m", "llm.inspect", "--run", str(tmp_path / "none"), "--prompt", "a"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "holds no run" in done.stderr
