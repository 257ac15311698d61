"""Mistakes in a configuration are told before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.config import load, parse
from core.errors import UserError
from rl.config import Experiment
from rl.start import build

CONFIGS = sorted(Path("configs/rl").glob("*.yaml"))


def experiment(**sections):
    base = {
        "run": {"name": "x"},
        "env": {"name": "CartPole-v1"},
        "train": {"steps": 640},
        "ppo": {"environments": 4, "rollout": 16},
    }
    return parse(Experiment, {key: base.get(key, {}) | more for key, more in (base | sections).items()})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_build(path):
    env, algorithm = build(load(Experiment, path))
    assert env.name == load(Experiment, path).env.name and callable(algorithm.update)


def test_what_a_run_is():
    made = experiment()
    assert (made.algorithm, made.steps_per_update, made.updates) == ("ppo", 64, 10)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"steps": 650}}, r"train\.steps \(650\) is not a multiple of the 64 .* 640 or 704"),
        ({"train": {"steps": 30}}, r"train\.steps \(30\) .*: for example 64"),
        ({"eval": {"every": 100}}, r"eval\.every \(100\) is not a multiple of the 64"),
        ({"checkpoint": {"every": 1}}, r"checkpoint\.every \(1\) is not a multiple of the 64"),
        (
            {"ppo": {"minibatches": 3}},
            r"environments x rollout \(4 x 16 = 64\) is not a multiple of minibatches \(3\)",
        ),
        ({"ppo": {"minibatches": 64}}, r"minibatches \(64\) leaves one step in each"),
        ({"ppo": {"hidden": [8, 0]}}, r"ppo\.hidden.*greater than or equal to 1"),
        ({"eval": {"every": 1280}}, r"eval\.every \(1280\) is never reached in train\.steps \(640\)"),
        ({"train": {"steps": 2**31}}, r"train\.steps.*less than 2147483648"),
        ({"mesh": {"fsdp": 2}}, r"mesh\.fsdp is 2: .* mesh\.data"),
        ({"ppo": {"learning_rat": 1}}, r"unknown key 'ppo\.learning_rat'; did you mean 'ppo\.learning_rate'"),
    ],
)
def test_mistakes_are_named(sections, message):
    with pytest.raises(UserError, match=message):
        experiment(**sections)


def test_networks_refuse_numbers_of_states():
    with pytest.raises(UserError, match=r"what Rooms shows is the number of a state.*: use q_learning"):
        build(experiment(env={"name": "Rooms"}))


def test_exactly_one_algorithm():
    with pytest.raises(UserError, match=r"the algorithm is the one section of ppo.*, and here none is"):
        parse(Experiment, {"run": {"name": "x"}, "env": {"name": "CartPole-v1"}, "train": {"steps": 64}})


@pytest.mark.parametrize("command", ["rl.train", "rl.play"])
def test_help_comes_without_jax(command):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{command}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: python -m rl." in done.stdout and done.stdout.endswith("False\n")
