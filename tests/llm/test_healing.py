"""A poisoned run heals by itself: each kind of divergence is injected into real training."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny import copy_corpus, experiment

import core.loop
import llm.loop
from core.checkpoint import Checkpointer
from core.errors import UserError
from core.metrics import read_metrics
from core.rewind import read_rewinds
from llm.config import Experiment
from llm.data.loader import Batch
from llm.loop import train

STEPS, RARE = 40, 299  # a token that the text hardly has


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(corpus: Path, runs: Path, name: str = "run", **divergence) -> Experiment:
    return experiment(
        corpus,
        runs,
        name,
        train={"steps": STEPS},
        optimizer={"schedule": "constant"},
        eval={"every": 4, "batches": 2},
        checkpoint={"every": 4, "keep": 3},
        divergence={"patience": 2, "skip": 2, **divergence},
    )


def poison(monkeypatch, numbers: range, spoil) -> list[int]:
    """Spoil the batches that have these numbers; the list collects the numbers of all that are taken."""
    taken: list[int] = []
    make = llm.loop.train_batch

    def spoiled(dataset, number, *rest):
        taken.append(number)
        batch = make(dataset, number, *rest)
        return spoil(batch) if number in numbers else batch

    monkeypatch.setattr(llm.loop, "train_batch", spoiled)
    return taken


def not_a_number(batch: Batch) -> Batch:
    return batch._replace(weights=batch.weights * np.float32("nan"))


def wrong_targets(batch: Batch) -> Batch:
    return batch._replace(targets=np.full_like(batch.targets, RARE))


def unlearning(batch: Batch) -> Batch:
    return batch._replace(weights=-batch.weights)


def one_token_counts(batch: Batch) -> Batch:
    """The gradient of one token instead of the mean over all: as large as its noise."""
    weights = np.zeros_like(batch.weights)
    weights[0, np.flatnonzero(batch.weights[0])[3]] = 1
    return batch._replace(weights=weights)


def figures(run: Path) -> list[tuple]:
    return [
        (line["step"], line["loss"], line.get("heldout_loss")) for line in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("spoil", "numbers", "metric", "options"),
    [
        (not_a_number, range(26, 27), "loss", {}),
        (wrong_targets, range(26, 30), "loss", {}),
        pytest.param(one_token_counts, range(26, 30), "grad_norm", {}, marks=pytest.mark.slow),
        pytest.param(
            unlearning, range(20, 28), "heldout_loss", {"threshold": 1e6, "watch": {"heldout_loss": "min"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["not finite", "loss spike", "gradient spike", "watched metric"],
)  # fmt: skip
def test_it_goes_back_skips_what_was_bad_and_goes_on(
    spoil, numbers, metric, options, corpus, tmp_path, monkeypatch, caplog
):
    taken = poison(monkeypatch, numbers, spoil)
    train(run_of(corpus, tmp_path, **options))
    run = tmp_path / "run"
    (rewind,) = read_rewinds(run / "rewinds.jsonl")
    start, stop = rewind.skipped
    assert rewind.metric == metric and metric in rewind.reason
    assert rewind.restored % 4 == 0 and rewind.restored <= start <= numbers[0] and numbers[-1] < stop
    assert len(rewind.lost_loss) == rewind.step - rewind.restored
    assert f"back to step {rewind.restored}" in caplog.text
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1)), "no step twice, none missing"
    assert all(np.isfinite(line["loss"]) for line in metrics)
    with Checkpointer(run / "checkpoints") as checkpointer:
        data = checkpointer.read_meta(STEPS)["data"]
    assert data == {"next_step": STEPS + stop - start, "skipped": [[start, stop]]}
    assert json.loads((run / "summary.json").read_text())["rewinds"] == 1

    if metric == "loss" and len(numbers) > 1:  # what it comes to is a run that never saw the skipped batches
        expected = [b for b in range(STEPS + stop - start + 1) if not start <= b < stop]
        monkeypatch.setattr(core.loop, "batch_of", lambda step, skipped: expected[step])
        del taken[:]
        train(run_of(corpus, tmp_path, "never", **options))
        assert not set(taken) & set(numbers)
        assert figures(run) == figures(tmp_path / "never")


@pytest.mark.slow
def test_a_rewound_run_that_is_killed_goes_on_as_if_it_had_not_been(corpus, tmp_path, monkeypatch):
    poison(monkeypatch, range(26, 27), not_a_number)
    train(run_of(corpus, tmp_path))
    put, calls = llm.loop.put_batch, iter(range(10**6))

    def kill(batch, mesh):
        if next(calls) == 28:  # the first steps after going back
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(llm.loop, "put_batch", kill)
        train(run_of(corpus, tmp_path, "killed"))
    killed = tmp_path / "killed"
    assert len(figures(killed)) < STEPS and len(read_rewinds(killed / "rewinds.jsonl")) == 1
    train(run_of(corpus, tmp_path, "killed"), resume=True)
    assert figures(killed) == figures(tmp_path / "run")

    (killed / "rewinds.jsonl").unlink()
    with pytest.raises(UserError, match=r"passed over batches that .*rewinds.jsonl doesn't name"):
        train(run_of(corpus, tmp_path, "killed"), resume=True)


def test_a_metric_that_turns_again_after_a_rewind_finds_its_checkpoint(corpus, tmp_path, monkeypatch):
    """Two are kept, and more than that are saved before the second turn is certain."""
    poison(monkeypatch, range(20, 44), unlearning)
    options = {"threshold": 1e6, "watch": {"heldout_loss": "min"}, "skip": 1, "patience": 3, "rewinds": 5}
    shorter = run_of(corpus, tmp_path, **options)
    train(dataclasses.replace(shorter, checkpoint=dataclasses.replace(shorter.checkpoint, keep=2)))
    rewinds = read_rewinds(tmp_path / "run/rewinds.jsonl")
    assert len(rewinds) > 1 and all(rewind.restored > 0 for rewind in rewinds)
    assert np.isfinite(read_metrics(tmp_path / "run/metrics.jsonl")[-1]["loss"])


def test_it_stops_when_it_keeps_diverging_and_can_be_helped_on(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(10, 10**6), not_a_number)
        with pytest.raises(UserError, match=r"step \d+, loss is nan; it has been rewound 2 time\(s\)"):
            train(run_of(corpus, tmp_path, rewinds=2))
    run = tmp_path / "run"
    assert len(read_rewinds(run / "rewinds.jsonl")) == 2
    assert np.isnan(read_metrics(run / "metrics.jsonl")[-1]["loss"]), "the last line shows why"
    train(run_of(corpus, tmp_path, rewinds=3), resume=True)
    assert len(figures(run)) == STEPS


def test_a_watched_metric_that_nothing_measures_is_named(corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"divergence\.watch: no evaluation has 'mmlu'; they have heldout_loss"
    ):
        train(run_of(corpus, tmp_path, watch={"mmlu": "max"}))
