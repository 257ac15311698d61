"""`python -m rl.train` and `rl.play` as a user runs them: the run folder, resuming, stopping, pictures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from runs import assert_same_bits, numbers, saved

import rl.loop
from core.checkpoint import Checkpointer
from core.errors import UserError
from core.mesh import MeshConfig, make_mesh
from core.metrics import read_metrics
from core.run import RunFolder
from rl.play import main as play
from rl.train import main as train

CONFIG = {
    "run": {"name": "run"},
    "env": {"name": "CartPole-v1", "normalize_observation": True, "normalize_reward": True},
    "train": {"steps": 640, "seeds": 2},
    "seed": 5,
    "ppo": {"environments": 4, "rollout": 16, "epochs": 1, "minibatches": 2, "hidden": [8]},
    "eval": {"every": 320, "episodes": 3},
    "checkpoint": {"every": 192},
}


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    """As on a laptop: two seeds don't divide over eight devices."""
    real = rl.loop.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.loop, "make_mesh", lambda options: real(options, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _one_device):
    """A run of ten updates, `whole`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(yaml.dump(CONFIG))
    train(command(folder, "whole"))
    return folder


def command(folder, name, *more):
    places = ["--set", f"run.dir={folder}", "--set", f"run.name={name}"]
    return ["--config", str(folder / "config.yaml"), *places, *more]


def test_the_run_folder(folder):
    run = RunFolder(folder / "whole")
    lines = read_metrics(run.metrics)
    assert [line["step"] for line in lines] == list(range(64, 641, 64))
    assert all("loss" in line and line["steps_per_second"] > 0 for line in lines)
    assert [line["step"] for line in lines if "eval_return_mean" in line] == [320, 640]
    summary = json.loads(run.summary.read_text())
    by_seed = [summary[f"eval_return_seed_{seed}"] for seed in (5, 6)]
    assert summary["eval_return_mean"] == pytest.approx(np.mean(by_seed))
    assert summary["eval_return_mean"] == pytest.approx(lines[-1]["eval_return_mean"])
    assert summary["eval_return_worst_seed"] == min(by_seed) >= 5
    assert summary["environment_steps"] == 640 and summary["eval_episodes"] == 6
    assert Checkpointer(run.checkpoints).steps() == [576, 640]
    assert Image.open(run.plots / "returns.png").size[0] > 500


class StopAfter:
    """A progress display that sends this process a signal after some updates, as a user would."""

    def __init__(self, step):
        self.step = step

    def __call__(self, *_):
        return self

    def __enter__(self):
        def show(done, points, status):
            if done == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

        return show

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of the same configuration that a signal ended after four updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.loop, "live", StopAfter(256))
        train(command(folder, "stopped"))
    run = RunFolder(folder / "stopped")
    assert max(Checkpointer(run.checkpoints).steps()) == 256 and not run.summary.exists()
    return run


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_on_another_mesh_it_is_the_same(folder, stopped, monkeypatch, devices):
    """Over two devices the two seeds are divided, over four the four environments of each."""
    moved, whole = RunFolder(folder / f"moved{devices}"), RunFolder(folder / "whole")
    shutil.copytree(stopped.path, moved.path)
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    monkeypatch.setattr(rl.loop, "make_mesh", lambda options: mesh)
    train(command(folder, moved.path.name, "--resume", "--set", f"mesh.data={devices}"))
    for ours, theirs in zip(numbers(moved.path), numbers(whole.path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    ours, theirs = saved(moved.path), saved(whole.path)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_stopped_and_resumed_is_the_same_bit_for_bit(folder, stopped):
    with pytest.raises(UserError, match="already holds a run"):
        train(command(folder, "stopped"))
    with pytest.raises(UserError, match=r"'ppo\.gamma' is 0\.99 there and 0\.5 now"):
        train(command(folder, "stopped", "--resume", "--set", "ppo.gamma=0.5"))
    shutil.copytree(stopped.path, folder / "resumed")
    train(command(folder, "resumed", "--resume"))
    assert numbers(folder / "resumed") == numbers(folder / "whole")
    assert_same_bits(saved(folder / "resumed"), saved(folder / "whole"))


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashbax", None)
    with pytest.raises(UserError, match=r"needs the package 'flashbax': pip install -e '\.\[rl\]'"):
        train(command(folder, "missing"))
    assert not (folder / "missing").exists()


def test_an_agent_that_is_no_longer_finite_is_told_and_not_saved(folder):
    wild = ["--set", "ppo.learning_rate=1e30", "--set", "ppo.clip_norm=1e30"]
    with pytest.raises(UserError, match=r"the agent of seed 5, 6 is no longer made of finite numbers.*ppo"):
        train(command(folder, "wild", *wild))
    assert Checkpointer(folder / "wild" / "checkpoints").latest_step() is None


def test_play_makes_a_gif(folder, capsys):
    play(["--run", str(folder / "whole"), "--seed", "6"])
    path = folder / "whole" / "plots" / "play.gif"
    assert f"{path}" in capsys.readouterr().out.replace("\n", "")
    with Image.open(path) as gif:
        assert gif.n_frames >= 5 and gif.size == (360, 240)
        first = np.asarray(gif.convert("RGB")).copy()
        gif.seek(gif.n_frames - 1)
        assert (np.asarray(gif.convert("RGB")) != first).any()
    with pytest.raises(UserError, match=r"the name of a GIF ends in \.gif"):
        play(["--run", str(folder / "whole"), "--out", "x.txt"])
    with pytest.raises(UserError, match="seeds 5 to 6"):
        play(["--run", str(folder / "whole"), "--seed", "7"])


def test_play_prints_sentences(folder, capsys):
    sentences = ["--set", "env.name=Sentences", "--set", "train.steps=64"]
    train(command(folder, "text", *sentences, "--set", "eval.every=0", "--set", "checkpoint.every=0"))
    capsys.readouterr()
    play(["--run", str(folder / "text"), "--episodes", "3", "--sample"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(float(line.split()[0]) <= 1 for line in lines)
