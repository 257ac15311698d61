"""Grid worlds: what a step does against the transition tensor, and value iteration against known values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import UserError
from rl.envs import grid
from rl.envs.grid import Grid, value_iteration

SMALL = """
    S.#
    SCG
"""


def _roll(env: Grid, cell: int, action: int, count: int):
    params = env.default_params
    state = grid.EnvState(cell=jnp.int32(cell), time=0)
    keys = jax.random.split(jax.random.key(cell * 4 + action), count)
    return jax.vmap(lambda key: env.step_env(key, state, action, params))(keys)


def test_steps_follow_the_model():
    env, count = Grid(SMALL, slip=0.4), 4000
    transition, reward, terminal = env.model()
    np.testing.assert_allclose(transition.sum(-1), 1)
    for cell in (0, 1, 3):
        for action in range(4):
            _, state, rewards, terminated, _ = _roll(env, cell, action, count)
            share = np.bincount(np.asarray(state.cell), minlength=6) / count
            np.testing.assert_allclose(share, transition[cell, action], atol=0.04)
            np.testing.assert_allclose(np.mean(rewards), reward[cell, action], atol=100 * 0.04)
            np.testing.assert_array_equal(terminated, terminal[np.asarray(state.cell)])


def test_without_slipping_moves_are_as_drawn():
    env = Grid(SMALL)
    transition, reward, _ = env.model()
    moves = transition.argmax(-1)
    assert moves[0].tolist() == [0, 1, 3, 0]  # up and left: the edge
    assert moves[1].tolist()[:2] == [1, 1]  # right: the wall
    np.testing.assert_allclose(transition[1, 2], [0.5, 0, 0, 0.5, 0, 0])  # the cliff: back to either start
    assert reward[1, 2] == -100 and reward[0, 1] == -1


def test_value_iteration_finds_the_known_values_of_the_cliff():
    """Sutton & Barto (2018), example 6.6: along the edge it takes 13 moves, the last one free."""
    env = Grid(grid.CLIFF)
    values = value_iteration(*env.model(), gamma=1.0)
    start = env.starts[0]
    assert values[start].max() == -12
    row = values.max(1).reshape(env.height, env.width)[2]
    np.testing.assert_allclose(row, np.arange(-11, 1), atol=1e-9)
    np.testing.assert_allclose(values[start, 1], -100 - 12)


def test_value_iteration_solves_the_linear_equations_of_its_policy():
    env, gamma = Grid(grid.ROOMS, slip=0.2), 0.95
    transition, reward, terminal = env.model()
    values = value_iteration(transition, reward, terminal, gamma)
    policy, cells = values.argmax(1), np.arange(env.num_cells)
    chain = transition[cells, policy] * ~terminal[:, None] * ~terminal[None, :]
    exact = np.linalg.solve(np.eye(env.num_cells) - gamma * chain, reward[cells, policy])
    np.testing.assert_allclose(values.max(1)[~terminal], exact[~terminal], atol=1e-8)


def test_an_episode_ends_at_the_goal_or_is_cut_off():
    env = Grid("S.G", slip=0.0, max_steps_in_episode=3)
    params = env.default_params
    step = jax.jit(env.step)
    _, state = env.reset(jax.random.key(0), params)
    for action, expected in (
        (1, (False, False)),
        (1, (True, False)),
        (3, (False, False)),
        (3, (False, False)),
    ):
        _, state, _, terminated, truncated, info = step(jax.random.key(1), state, action, params)
        assert (bool(terminated), bool(truncated)) == expected
    assert int(state.time) == 2
    observation, state, _, terminated, truncated, info = step(jax.random.key(1), state, 1, params)
    assert (bool(terminated), bool(truncated)) == (False, True)
    assert int(info["final_observation"]) == 1 and int(observation) == 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [("S..\n.G", "equally long"), ("...\n..G", "no start"), ("S..\n...", "no goal")],
)
def test_a_drawing_that_is_no_grid_is_an_error(layout, message):
    with pytest.raises(UserError, match=message):
        Grid(layout)
