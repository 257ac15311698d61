"""Checkpoints of every family in, as runs, and out again: the same bits, the same logits, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from hf_models import CASES, make, write
from safetensors.torch import load_file

from core.checkpoint import newest_params
from core.config import load
from core.run import RunFolder
from export.hf import main
from export.read import import_run, read_params
from export.verify import verify
from export.write import export_run
from llm.config import Experiment
from llm.generate import main as generate
from llm.model.transformer import blueprint
from llm.train import main as train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.fixture
def checkpoint(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    return lambda name, **options: write(name, tmp_path / "theirs", corpus, **options)


OF_EACH_FAMILY = (
    "llama",
    "mistral-window",
    "qwen2-tied-window",
    "qwen3-tied",
    "mixtral",
    "qwen3-moe",
    "neox",
)
SLOWLY = [pytest.param(name, marks=[] if name in OF_EACH_FAMILY else [pytest.mark.slow]) for name in CASES]


@pytest.mark.parametrize("name", SLOWLY)
def test_in_and_out_again(name, checkpoint, tmp_path):
    theirs, run, ours = checkpoint(name, max_shard_size="60KB"), tmp_path / "runs/imported", tmp_path / "ours"
    import_run(theirs, run)
    assert load(Experiment, run / "config.yaml").model == CASES[name][0]
    export_run(RunFolder.open(run), ours, shard_bytes=70_000)
    assert_same_bits(weights(ours), weights(theirs))
    assert len(list(ours.glob("model-*.safetensors"))) > 2
    found = verify(RunFolder.open(run), 0, ours)
    assert found.difference < 1e-5 and found.largest > 1 and found.same_choice == 1


@pytest.mark.parametrize("name", ["neox", "mixtral"])
def test_bfloat16_comes_back_as_it_was(name, checkpoint, tmp_path):
    theirs, run, ours = checkpoint(name, dtype=torch.bfloat16), tmp_path / "run", tmp_path / "ours"
    import_run(theirs, run)
    main(["--run", str(run), "--out", str(ours), "--scheme", "bf16"])
    assert_same_bits(weights(ours), weights(theirs))
    assert transformers.AutoConfig.from_pretrained(ours).dtype == torch.bfloat16


def test_a_rounded_export_is_verified_with_the_rounded_values(checkpoint, tmp_path, capsys):
    import_run(checkpoint("llama"), tmp_path / "run")
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "ours"), "--scheme", "bf16"]
    main([*arguments, "--verify"])
    assert "logits of weights rounded to bfloat16 in float32, 5 prompts of" in capsys.readouterr().out
    values, exact = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert all(torch.equal(values[name], exact[name].bfloat16()) for name in exact)


def test_float16_is_widened(checkpoint, tmp_path):
    import_run(checkpoint("qwen2", dtype=torch.float16), tmp_path / "run")
    export_run(RunFolder.open(tmp_path / "run"), tmp_path / "ours")
    exact = {name: value.float() for name, value in weights(tmp_path / "theirs").items()}
    assert_same_bits(weights(tmp_path / "ours"), exact)


def test_an_imported_run_generates_at_once(checkpoint, tmp_path, capsys):
    import_run(checkpoint("llama"), tmp_path / "run")
    generate(
        [
            "--run",
            f"{tmp_path}/run",
            "--prompt",
            "The",
            "--temperature",
            "0",
            "--max-new-tokens",
            "6",
            "--json",
        ]
    )
    ours = json.loads(capsys.readouterr().out)
    theirs = make("llama").generate(
        torch.tensor([ours["prompt_token_ids"]]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert ours["token_ids"] == theirs[0, len(ours["prompt_token_ids"]) :].tolist()


@pytest.mark.slow
def test_an_imported_run_trains_at_once(checkpoint, tmp_path):
    import_run(checkpoint("llama"), tmp_path / "imported")
    config = ["--config", str(tmp_path / "imported/config.yaml"), "--set", "train.steps=2"]
    train([*config, "--set", "run.name=tuned", "--set", f"init.from={tmp_path}/imported"])
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) >= 2 and all(np.isfinite(losses))
    export_run(RunFolder.open(tmp_path / "tuned"), tmp_path / "ours")
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-3  # two steps at the low rate that an imported run has


def test_parameters_go_where_the_target_says(checkpoint, tmp_path):
    folder = checkpoint("neox")
    import_run(folder, tmp_path / "run")
    shapes = blueprint(CASES["neox"][0]).shapes
    whole = newest_params(RunFolder.open(tmp_path / "run"), shapes)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        axis = max(range(len(leaf.shape)), key=lambda i: leaf.shape[i] * (leaf.shape[i] % 2 == 0))
        spec = jax.P(*(("x" if i == axis else None) for i in range(len(leaf.shape))))
        if leaf.shape[axis] % 2:
            spec = jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=jax.NamedSharding(mesh, spec))

    target = jax.tree.map(place, shapes)
    placed = read_params(folder, target)
    for part, all_, goal in zip(*map(jax.tree.leaves, (placed, whole, target)), strict=True):
        assert part.sharding == goal.sharding
        assert np.array_equal(np.asarray(part), np.asarray(all_.astype("bfloat16")))
