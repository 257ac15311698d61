"""Q-learning against value iteration, with discount and slip, and one of its updates by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import parse
from core.errors import UserError
from rl import q_learning, start
from rl.config import Experiment
from rl.envs import grid, wrapper
from rl.envs.grid import Grid, value_iteration
from rl.envs.wrapper import Env
from rl.replay import Transition

DRAWING = """
    S..#
    .#..
    ..CG
"""


def _experiment(env="Rooms", **options) -> Experiment:
    options = {"environments": 16, "train_every": 160, "gamma": 0.9} | options
    return parse(
        Experiment,
        {"run": {"name": "t"}, "env": {"name": env}, "train": {"steps": 160_000}, "q_learning": options},
    )


def test_it_finds_the_optimal_values_under_slip_and_discount():
    world = Grid(DRAWING, slip=0.2, cliff_reward=-5.0, goal_reward=1.0, max_steps_in_episode=8)
    env = Env("drawing", world, world.default_params)
    algorithm = q_learning.make(_experiment(epsilon_final=0.5), env)
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 6000, lambda _, s: algorithm.update(s)[0], s))
    table, training = run(algorithm.init(jax.random.key(0)))
    transition, reward, terminal = world.model()
    expected = value_iteration(transition, reward, terminal, 0.9)
    # Most episodes are cut off by the time limit, which the values must not know of.
    visited = np.asarray(training.visits) > 0
    assert visited[~terminal & ~world.walls & ~world.cliffs].all()
    gap = np.abs(np.asarray(table) - expected)[visited]
    assert gap.max() < 0.1 and gap.mean() < 0.03, (gap.max(), gap.mean())  # of values from -11 to 1
    reached = np.flatnonzero(visited.any(1))
    ordered = np.sort(expected[reached], 1)
    clear = reached[ordered[:, -1] - ordered[:, -2] > 0.2]
    np.testing.assert_array_equal(np.asarray(table)[clear].argmax(1), expected[clear].argmax(1))


def test_one_update_by_hand():
    table = jnp.float32([[1, 2], [3, 5], [7, 0]])
    visits = jnp.int32([[0, 3], [0, 0], [0, 0]])
    seen = Transition(
        observation=jnp.float32([0, 0, 1, 0]),
        action=jnp.int32([1, 1, 0, 0]),
        reward=jnp.float32([10, 20, 1, 4]),
        terminated=jnp.bool_([False, False, True, False]),
        next_observation=jnp.float32([1, 1, 2, 0]),
    )
    new, counted, errors = q_learning.improve(table, visits, seen, 0.5, 1.0)
    np.testing.assert_allclose(errors, [10 + 2.5 - 2, 20 + 2.5 - 2, 1 - 3, 4 + 1 - 1])
    # Two transitions of one pair count once, by their mean, here as its fourth visit.
    np.testing.assert_allclose(new, [[1 + 4, 2 + (10.5 + 20.5) / 2 / 4], [3 - 2, 5], [7, 0]])
    np.testing.assert_array_equal(counted, [[1, 4], [1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environments": 16, "train_every": 24}, r"train_every \(24\) is not a multiple of environments"),
        ({"train_every": 96}, r"train.steps \(160000\) is not a multiple of the 96"),
    ],
)
def test_a_misaligned_interval_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        _experiment(**change)


def test_an_environment_without_a_table_is_an_error():
    experiment = _experiment("CartPole-v1")
    with pytest.raises(UserError, match="CartPole-v1 has no table of states and actions: use ppo"):
        start.build(experiment)
    assert set(grid.GRIDS) <= set(wrapper.names())
