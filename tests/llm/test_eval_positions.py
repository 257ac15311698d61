"""`python -m llm.eval.positions`: its windows, its losses beside the evaluation's, and a two-stage recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny import copy_corpus, experiment, random_params, stream, write_shards

from core.errors import UserError
from core.mesh import make_mesh
from core.options import MeshConfig
from llm.data.loader import Batch, TokenDataset, open_dataset
from llm.eval import positions
from llm.eval.heldout import make_evaluate
from llm.eval.positions import find_windows, make_losses, window_batches
from llm.loop import train
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint
from llm.prepare import prepare

ROOT = Path(__file__).parents[2]
SCALING = {"kind": "yarn", "factor": 2.0, "original_length": 16}
MODEL = ModelConfig(
    vocab_size=128,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_length=16,
)


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    """Tokens 0, 1, 2, ... in documents of 10, 3 and 9 in one shard, 17, 12 and 5 in another."""
    weights = [[1.0, 1.0, 2.5], [1.0, 0.0, 1.0]]
    shards = write_shards(tmp_path / "shards", stream([[10, 3, 9], [17, 12, 5]]), weights)
    return open_dataset([shards], "train", 8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def stages(corpus, tmp_path_factory) -> Path:
    """The folder of two runs: `first` at 16 tokens, and `second` at 32 with RoPE rescaled, unchanged yet."""
    runs = tmp_path_factory.mktemp("runs")
    evaluation = {"eval": {"every": 0, "batches": 1}}
    train(experiment(corpus, runs, "first", **evaluation))
    train(
        experiment(
            corpus,
            runs,
            "second",
            init={"from": str(runs / "first")},
            data={"sequence_length": 32},
            model={"rope_scaling": SCALING},
            train={"steps": 1},
            optimizer={"learning_rate": 1e-30, "warmup_steps": 0, "weight_decay": 0.0},
            **evaluation,
        )
    )
    return runs


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Calls the command in this process; what it printed."""
    monkeypatch.setattr(positions.devices, "prepare", lambda: None)  # JAX is imported already

    def call(*arguments: str | Path) -> str:
        positions.main([*map(str, arguments), "--plot", str(tmp_path / "plot.png")])
        return capsys.readouterr().out

    return call


def test_windows_tile_each_document_from_its_first_token(dataset):
    found = find_windows(dataset, 4)
    assert found.tolist() == [[0, 0], [0, 4], [0, 13], [0, 17], *([1, i] for i in (0, 4, 8, 12)), [1, 29]]
    first = [0, 4, 13, 17, 22, 26, 30, 34, 51]
    batches = list(window_batches(dataset, 4, found, 2))
    tokens, targets, segments, places, weights = map(np.concatenate, zip(*batches, strict=True))
    assert_array_equal(tokens[:9], np.array(first)[:, None] + np.arange(4))
    assert_array_equal(targets[:9], tokens[:9] + 1)
    assert_array_equal(places, np.broadcast_to(np.arange(4), (10, 4)))
    assert_array_equal(segments, np.repeat([1] * 9 + [0], 4).reshape(10, 4))
    assert_array_equal(weights, segments)  # a document's own weight is for training; padding counts nothing
    rows = list(window_batches(dataset, 4, found, 4, slice(1, 3)))
    whole = list(window_batches(dataset, 4, found, 4))
    assert all(
        np.array_equal(part, all_rows[1:3])
        for a, b in zip(rows, whole, strict=True)
        for part, all_rows in zip(a, b, strict=True)
    )


def test_of_many_windows_some_are_spread_over_the_split(dataset, monkeypatch):
    monkeypatch.setattr(positions, "MOST_TOKENS", 12)
    assert find_windows(dataset, 4).tolist() == [[0, 0], [0, 17], [1, 8]]


def test_a_length_that_no_document_has_is_told_with_the_longest(dataset):
    with pytest.raises(UserError, match=r"--length 32: no held-out .* longest has 16 tokens"):
        find_windows(dataset, 32)


@pytest.mark.parametrize("options", [MeshConfig(data=1), MeshConfig(data=2, tensor=2, context=2)])
def test_losses_are_those_of_the_evaluation_at_each_position(dataset, options):
    params, model = random_params(MODEL, 0.3), blueprint(MODEL)
    windows, lengths = find_windows(dataset, 4), np.ones((2, 128), np.int32)
    batches = list(window_batches(dataset, 4, windows, 4))
    assert len(windows) % 4  # the last batch has padding
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    mesh = one if options.data == 1 else make_mesh(options)
    with jax.set_mesh(mesh):
        losses = make_losses(model, 2, 8, mesh)(params, iter(batches))
    assert losses.shape == (2,) and losses.std() > 0.01
    with jax.set_mesh(one):
        evaluate = make_evaluate(model, 8, lengths, one)
        whole = evaluate(params, batches)["heldout_loss"]
        pieces = [
            evaluate(params, [_only(batch, slice(first, first + 2)) for batch in batches])["heldout_loss"]
            for first in range(0, 4, 2)
        ]
    assert_allclose(losses, pieces, rtol=1e-5)
    assert losses.mean() == pytest.approx(whole, rel=1e-5)


def _only(batch: Batch, places: slice) -> Batch:
    weights = np.zeros_like(batch.weights)
    weights[:, places] = batch.weights[:, places]
    return batch._replace(weights=weights)


def test_a_second_stage_begins_as_the_first_with_its_scaling(command, stages, tmp_path):
    first, second = stages / "first", stages / "second"
    scaled = ("--run", first, "--set", f"model.rope_scaling={json.dumps(SCALING)}")
    out = command("--run", first, *scaled, "--run", second, "--length", 32, "--json")
    found = json.loads(out)
    plain, rescaled, continued = (np.array(run["loss_by_position"]) for run in found["runs"])
    assert_allclose(continued, rescaled, rtol=1e-6)
    assert np.abs(plain - continued).max() > 1e-4  # the scaling changes what is computed
    assert found["positions"] == list(range(32)) and found["windows"] > 8
    assert [run["label"] for run in found["runs"]][::2] == ["first", "second"]
    assert "rope_scaling" in found["runs"][1]["label"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_moved_away_from_its_first_stage_is_read_alone(command, stages, tmp_path):
    """A window is of one document, so it makes no difference whether documents are kept apart."""
    moved = shutil.copytree(stages / "second", tmp_path / "elsewhere" / "moved")
    gone = ("--set", f"init.from={tmp_path}/gone")
    joined = ("--run", moved, *gone, "--set", "data.isolate=false")
    apart, together = json.loads(command("--run", moved, *gone, *joined, "--length", 16, "--json"))["runs"]
    assert [apart["label"], together["label"]] == ["moved", "moved (data.isolate=false)"]
    assert_allclose(apart["loss_by_position"], together["loss_by_position"], rtol=1e-5)
    table = command("--run", moved, *gone, "--length", 16)
    assert "8 to 15" in table and f"{apart['loss']:.3f}" in table


def test_runs_of_other_tokens_are_not_compared(command, corpus, stages, tmp_path):
    other = shutil.copytree(stages / "first", tmp_path / "other")
    text = prepare(experiment(corpus, tmp_path, tokenizer={"vocab_size": 280}))
    shutil.rmtree(other / "tokenizer")
    text.tokenizer.save(other / "tokenizer")
    with pytest.raises(UserError, match=r"other has another tokenizer than .*first"):
        command("--run", stages / "first", "--run", other)


def test_mistakes_are_told(command, stages, capsys):
    with pytest.raises(UserError, match=r"firts holds no run .*did you mean .*/first\?"):
        command("--run", stages / "firts")
    with pytest.raises(UserError, match=r"--length 48: choose a power of two"):
        command("--run", stages / "first", "--length", 48)
    with pytest.raises(UserError, match=r"--length 1048576: no held-out document is as long"):
        command("--run", stages / "first", "--length", 2**20)
    with pytest.raises(SystemExit) as stopped:
        command("--set", "model.rope_theta=2.0", "--run", stages / "first")
    assert stopped.value.code == 2 and "name the run first" in capsys.readouterr().err


def test_help_and_mistakes_answer_without_jax(tmp_path):
    code = "import runpy, sys\ntry: runpy.run_module('llm.eval.positions', run_name='__main__')\n"
    code += "finally: assert 'jax' not in sys.modules"
    for arguments, status in ((["--help"], 0), (["--run", str(tmp_path / "no")], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and "holds no run" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": {"from": "nowhere/run"}}, r"init\.from: nowhere/run holds no run .* train that run first"),
        (
            {"model": {"rope_scaling": SCALING | {"original_length": 64}}},
            r"original_length \(64\) is longer than model\.max_length \(32\)",
        ),
        (
            {"model": {"rope_scaling": SCALING | {"beta_slow": 32.0}}},
            r"beta_slow \(32\) must be positive and less than beta_fast \(32\)",
        ),
    ],
)
def test_a_second_stage_that_cannot_begin_says_why_and_leaves_no_run(corpus, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(experiment(corpus, tmp_path, **changes))
    assert not (tmp_path / "run").exists()
