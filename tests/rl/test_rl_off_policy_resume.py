"""A run of DQN or DDPG that goes on from a checkpoint, replay with it, is the run that never stopped."""

from __future__ import annotations

import shutil

import jax
import pytest
import yaml
from runs import assert_same_bits, numbers, saved

import rl.loop
from core.checkpoint import Checkpointer
from core.run import RunFolder
from rl.train import main as train

COMMON = {"environments": 4, "train_every": 16, "gradient_steps": 2, "learning_starts": 32, "hidden": [8]}
SMALL = COMMON | {"replay_size": 100, "batch_size": 8}  # the ring has wrapped around where the run is cut
CASES = {
    "dqn": ("CartPole-v1", SMALL | {"target_every": 32, "prioritized": {}, "epsilon_hold": 2.0}),
    "ddpg": ("Pendulum-v1", SMALL | {"noise": "ornstein_uhlenbeck"}),
    "q_learning": ("Rooms", {"environments": 4, "train_every": 16}),
}


@pytest.mark.parametrize(
    "name", ["q_learning", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dqn", "ddpg"))]
)
def test_stopped_and_resumed_is_the_same_bit_for_bit(name, tmp_path, monkeypatch):
    real = rl.loop.make_mesh
    monkeypatch.setattr(rl.loop, "make_mesh", lambda options: real(options, jax.devices()[:1]))
    env, section = CASES[name]
    data = {
        "run": {"name": "whole", "dir": str(tmp_path)},
        "env": {"name": env},
        "train": {"steps": 256, "seeds": 2},
        "eval": {"episodes": 2},
        "checkpoint": {"every": 128, "keep": 2},
        name: section,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump(data))
    train(["--config", str(config)])
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    shutil.rmtree(cut.checkpoints / "256")
    cut.summary.unlink()
    assert Checkpointer(cut.checkpoints).steps() == [128]
    train(["--config", str(config), "--set", "run.name=cut", "--resume"])
    assert numbers(cut.path) == numbers(whole.path)
    assert_same_bits(saved(cut.path), saved(whole.path))
