"""Every notebook stands executed in the repository, and runs on any run."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny import copy_corpus, experiment

import clip.config
import clip.loop
import llm.loop
import rl.config
import rl.loop
from core.config import parse

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIXTURES = {"zero_shot_eval": "dual_encoder", "rewards_analysis": "agents"}  # others: language_model
MACHINE_PATH = re.compile(r"/(work|tmp|root|home)/\S*")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stands_executed(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert re.fullmatch(r'RUN = "runs/[\w/-]+"', cells[0].source)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output.data.pop("image/png") for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert not MACHINE_PATH.search(nbformat.writes(notebook))  # without pictures: base64 might hold anything


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    corpus, runs = copy_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("runs")
    llm.loop.train(experiment(corpus, runs, train={"steps": 40}, model={"max_length": 128}))
    return runs / "run"


@pytest.fixture(scope="module")
def dual_encoder(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("dual")
    shape = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "mlp_dim": 32}
    image = {**shape, "size": 16, "patch_size": 8}
    text = {**shape, "vocab_size": 300, "length": 16}
    options = {
        "run": {"name": "run", "dir": str(runs)},
        "data": {"batch_size": 64},
        "model": {"embed_dim": 8, "image": image, "text": text},
        "train": {"steps": 10},
    }
    clip.loop.train(parse(clip.config.Experiment, options))
    return runs / "run"


@pytest.fixture(scope="module")
def agents(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("agents")
    options = {
        "run": {"name": "run", "dir": str(runs)},
        "env": {"name": "Pendulum-v1"},
        "train": {"steps": 3200, "seeds": 2},  # twice the time limit of eight environments
        "ddpg": {"environments": 8, "train_every": 16, "gradient_steps": 1, "hidden": [8]},
        "eval": {"episodes": 4},
    }
    rl.loop.train(parse(rl.config.Experiment, options))
    return runs / "run"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_another_run(path, request):
    run = request.getfixturevalue(FIXTURES.get(path.stem, "language_model"))
    notebook = nbformat.read(path, as_version=4)
    code_cells(notebook)[0].source = f"RUN = {str(run)!r}"
    # Raises where a cell does.
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any(
        "image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs
    )
