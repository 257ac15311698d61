"""Shipped configurations learn what docs/rl.md says; `python -m benchmarks.rl_returns` trains them all."""

from __future__ import annotations

import jax
import pytest

from core.config import load
from core.mesh import make_mesh
from core.options import MeshConfig
from rl import start
from rl.config import Experiment
from rl.loop import advance_under, make_programs


@pytest.mark.parametrize(
    ("name", "seed", "least"),
    [
        ("ppo-cartpole", 0, 475),
        pytest.param("ddpg-pendulum", 0, -200, marks=pytest.mark.slow),
        pytest.param("ppo-acrobot", 0, -100, marks=pytest.mark.slow),
        pytest.param("ppo-sentences", 0, 0.99, marks=pytest.mark.slow),
    ],
)
def test_a_shipped_configuration_learns(name, seed, least):
    made = load(Experiment, f"configs/rl/{name}.yaml", ["train.seeds=1", f"seed={seed}"])
    env, algorithm = start.build(made)
    programs = make_programs(made, env, algorithm, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    state = programs.init(start.seeds(made))
    state, *_ = advance_under(programs, state)(state, made.updates)
    returns, _ = programs.evaluate(state.agent, start.seeds(made), made.train.steps)
    assert returns.shape == (1, 100) and returns.mean() >= least, returns.mean()
