"""Every notebook stands executed in the repository, and runs on any run."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny import copy_corpus, experiment

from llm.loop import train

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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
def trained(tmp_path_factory) -> Path:
    corpus, runs = copy_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("runs")
    train(experiment(corpus, runs, train={"steps": 40}, model={"max_length": 128}))
    return runs / "run"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_another_run(path, trained):
    notebook = nbformat.read(path, as_version=4)
    code_cells(notebook)[0].source = f"RUN = {str(trained)!r}"
    # Raises where a cell does.
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any(
        "image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs
    )
