"""A run moves between meshes and numbers of devices: the same state bit for bit, then the same course."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
from runs import assert_same_bits, named, numbers, saved, stop_at
from tiny import copy_corpus, experiment

import llm.setup
from core.mesh import make_mesh
from core.state import State, split, state_shardings
from llm.config import Experiment
from llm.loop import train
from llm.start import state_at

# What a run has for state, and the devices it is on and how they are arranged, each for three steps.
COURSES: dict[str, tuple[dict[str, Any], list[tuple[int, dict[str, int]]]]] = {
    "adamw": (
        {},
        [(8, {"data": 2, "fsdp": 2, "tensor": 2}), (4, {"fsdp": 4}), (2, {"tensor": 2}), (8, {"fsdp": 8})],
    ),
    "muon": (
        {"optimizer": {"name": "muon"}},
        [(8, {"fsdp": 4, "tensor": 2}), (4, {"data": 2, "tensor": 2}), (2, {"fsdp": 2}), (8, {"data": 8})],
    ),
    "float16 and an average": (
        {"train": {"dtype": "float16", "average": 0.9}},
        [(8, {"data": 4, "context": 2}), (4, {"fsdp": 2, "tensor": 2}), (2, {"data": 2}), (8, {"fsdp": 8})],
    ),
}
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(corpus: Path, runs: Path, name: str, mesh: dict[str, int], changes: dict[str, Any]) -> Experiment:
    return experiment(
        corpus,
        runs,
        name,
        mesh={"data": 1, **mesh},
        model={"num_kv_heads": 2},
        train={"steps": STEPS, **changes.get("train", {})},
        optimizer={"learning_rate": 3e-3, **changes.get("optimizer", {})},
        eval={"every": 0},
        checkpoint={"every": 100},
    )


@pytest.mark.parametrize(
    "kind", [kind if kind == "adamw" else pytest.param(kind, marks=pytest.mark.slow) for kind in COURSES]
)
def test_a_run_that_moves_from_mesh_to_mesh(kind, corpus, tmp_path, monkeypatch):
    """Every three steps it is stopped by SIGTERM, which saves it, and taken up on other devices."""
    changes, meshes = COURSES[kind]
    restored: list[State] = []

    def remember(setup, checkpointer, step):
        state = state_at(setup, checkpointer, step)
        places = state_shardings(setup.model, setup.experiment.train, setup.optimizer, setup.mesh)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places))
        restored.append(jax.device_get(state))
        return state

    monkeypatch.setattr("llm.loop.state_at", remember)
    with monkeypatch.context() as alone:
        alone.setattr(llm.setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        train(run_of(corpus, tmp_path, "still", {}, changes))
    moving, before = tmp_path / "moving", None
    for number, (devices, mesh) in enumerate(meshes):
        with monkeypatch.context() as patch:
            there = functools.partial(make_mesh, devices=jax.devices()[:devices])
            patch.setattr(llm.setup, "make_mesh", there)
            if number < len(meshes) - 1:
                stop_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train(run_of(corpus, tmp_path, "moving", mesh, changes), resume=number > 0)
        if before is not None:
            assert int(restored[-1].step) == 3 * number
            params, rest = split(restored[-1])
            assert_same_bits(named(params, "params") | named(rest, "opt"), before)
        before = saved(moving)
    ours, theirs = numbers(moving), numbers(tmp_path / "still")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4), our["step"]
        assert our.get("loss_scale") == their.get("loss_scale")
    assert ours[-1]["heldout_loss"] == pytest.approx(theirs[-1]["heldout_loss"], rel=1e-4)
