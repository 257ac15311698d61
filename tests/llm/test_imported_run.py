"""A run that has weights from elsewhere as its checkpoint of step 0 trains on from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import assert_same_parameters, numbers
from tiny import copy_corpus, experiment

import llm.loop
from core.checkpoint import Checkpointer
from core.config import to_yaml
from core.errors import UserError
from core.rewind import read_rewinds
from core.run import RunFolder
from core.tensors import SavedParams, write_params
from llm.config import Experiment
from llm.loop import train

OPTIONS: dict = {"checkpoint": {"every": 2, "keep": 2}, "divergence": {"patience": 1, "skip": 1}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(experiment(corpus, runs, "source", train={"steps": 3}))
    return runs / "source"


def pieces(saved: SavedParams) -> Iterator[tuple]:
    """Layer by layer, the embedding by rows."""
    for path, shape in leaves(saved.shapes):
        count = shape[0] if path[0] == "blocks" else 1
        for i in range(count):
            index = (i,) if path[0] == "blocks" else (slice(None),)
            yield path, index, saved.read(path, index)


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value.shape


def import_run(source: Path, config: Experiment) -> Path:
    """The weights and the tokenizer of `source` as an import leaves them."""
    run, saved = RunFolder(Path(config.run.folder)), SavedParams.open(RunFolder(source))
    write_params(run, saved.shapes, pieces(saved), {"imported": "by a test"})
    shutil.copytree(source / "tokenizer", run.tokenizer)
    run.config.write_text(to_yaml(config))
    return run.path


def test_it_trains_as_a_run_that_begins_from_them(source, corpus, tmp_path, caplog):
    imported = experiment(corpus, tmp_path, "imported", train={"steps": 6}, **OPTIONS)
    run = import_run(source, imported)
    with pytest.raises(UserError, match="--resume"):
        train(imported)
    caplog.set_level("INFO")
    train(imported, resume=True)
    assert f"starting from the imported weights in {run}/checkpoints/0" in caplog.text
    begun = experiment(corpus, tmp_path, "begun", init={"from": str(source)}, train={"steps": 6}, **OPTIONS)
    train(begun)
    assert numbers(run) == numbers(tmp_path / "begun")
    assert_same_parameters(run, tmp_path / "begun")
    assert Checkpointer(run / "checkpoints").steps() == [0, 4, 6], "what it began from is kept"


@pytest.mark.slow
def test_it_rewinds_to_them_where_it_has_no_other_checkpoint(source, corpus, tmp_path, monkeypatch):
    """It diverges on batch 1, before its first checkpoint, and on batch 8."""
    make = llm.loop.train_batch

    def spoiled(dataset, number, *rest):
        batch = make(dataset, number, *rest)
        return batch._replace(weights=batch.weights * np.float32("nan")) if number in (1, 8) else batch

    monkeypatch.setattr(llm.loop, "train_batch", spoiled)
    imported = experiment(corpus, tmp_path, "imported", **OPTIONS)
    run = import_run(source, imported)
    train(imported, resume=True)
    train(experiment(corpus, tmp_path, "begun", init={"from": str(source)}, **OPTIONS))
    restored = [rewind.restored for rewind in read_rewinds(run / "rewinds.jsonl")]
    assert restored[0] == 0 and len(restored) == 2 and restored[1] > 0
    assert restored == [rewind.restored for rewind in read_rewinds(tmp_path / "begun" / "rewinds.jsonl")]
    assert numbers(run) == numbers(tmp_path / "begun")
    assert_same_parameters(run, tmp_path / "begun")


@pytest.mark.slow
def test_without_its_later_checkpoints_it_starts_again_from_them(source, corpus, tmp_path):
    imported = experiment(corpus, tmp_path, "imported", train={"steps": 4}, **OPTIONS)
    run = import_run(source, imported)
    train(imported, resume=True)
    first = numbers(run)
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    train(imported, resume=True)
    assert numbers(run) == first


def test_another_tokenizer_is_refused(source, corpus, tmp_path):
    train(experiment(corpus, tmp_path, "other", train={"steps": 1}, tokenizer={"vocab_size": 280}))
    imported = experiment(corpus, tmp_path, "imported", tokenizer={"path": str(tmp_path / "other/tokenizer")})
    import_run(source, imported)
    with pytest.raises(UserError, match=r"tokenizer\.path: .* is not the tokenizer of the imported weights"):
        train(imported, resume=True)
