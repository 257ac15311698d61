"""Maps of values and policies: their points are states of the environment, and they are drawn."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from core.config import parse
from core.errors import UserError
from rl import maps, start
from rl.config import Experiment
from rl.envs import wrapper
from rl.start import Trained

EVERY = {"environments": 4, "train_every": 4}
SMALL = EVERY | {"gradient_steps": 1, "learning_starts": 8, "hidden": [8], "replay_size": 128}
SECTIONS = {
    "Rooms": ("q_learning", EVERY),
    "MountainCar-v0": ("dqn", SMALL | {"target_every": 4}),
    "Pendulum-v1": ("ddpg", SMALL),
    "CartPole-v1": ("ppo", {"environments": 4, "rollout": 4, "hidden": [8]}),
}


def _untrained(name: str) -> Trained:
    algorithm, section = SECTIONS[name]
    data = {
        "run": {"name": "t"},
        "env": {"name": name},
        "train": {"steps": 16, "seeds": 2},
        algorithm: section,
    }
    experiment = parse(Experiment, data)
    env, made = start.build(experiment)
    return Trained(experiment, env, made, start.init(made, start.seeds(experiment)).agent)


@pytest.mark.parametrize("name", ["Rooms", "MountainCar-v0", "Pendulum-v1"])
def test_a_map_is_drawn(name, tmp_path):
    path = tmp_path / "plots" / "maps.png"
    trained = _untrained(name)
    maps.draw(trained, start.agent_of(trained, 1), path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Pendulum-v1", ("theta", "theta_dot")),
        ("MountainCar-v0", ("position", "velocity")),
        ("MountainCarContinuous-v0", ("position", "velocity")),
    ],
)
def test_points_of_the_plane_are_what_the_environment_shows(name, fields):
    env = wrapper.make(name)
    observation, state = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 50))
    plane = maps.PLANES[name]
    across, up = (np.broadcast_to(getattr(state.inner, field), 50) for field in fields)
    np.testing.assert_allclose(plane.observe(across, up), observation, atol=1e-6)
    space = env.inner.observation_space(env.params)
    assert plane.up.most == pytest.approx(float(space.high[-1]))
    if isinstance(env.actions, wrapper.Continuous):
        high = env.inner.action_space(env.params).high
        assert plane.scale == pytest.approx(float(np.max(high)))
    else:
        assert len(plane.choices) == env.actions.n


def test_states_that_make_no_plane_are_an_error(tmp_path):
    with pytest.raises(UserError, match="CartPole-v1 has no map"):
        maps.draw(_untrained("CartPole-v1"), None, tmp_path / "maps.png")
