"""Grid worlds drawn as text, with slippery moves, whose exact transition probabilities are at hand.

A layout is lines of equal length: `S` start (one of several at random), `G` goal, `C` cliff, `#` wall,
anything else floor. A move into a wall or over the edge stays where it is. Reaching a goal ends the episode;
a cliff costs its reward and puts the walker back on a start, as in Sutton & Barto (2018), example 6.6.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces
from jaxtyping import Bool, Float, Int

from core.errors import UserError

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # row and column of each action: up, right, down, left
ARROWS = "↑→↓←"

CLIFF = """
    ............
    ............
    ............
    SCCCCCCCCCCG
"""
ROOMS = """
    S....#....
    .....#....
    ..........
    .....#....
    ##.####.##
    .....#....
    .....#..C.
    ........C.
    .....#...G
"""


@struct.dataclass
class EnvState(environment.EnvState):
    cell: Any  # row * width + column
    time: Any


@struct.dataclass
class EnvParams(environment.EnvParams):
    # Numbers, or arrays where they are traced.
    slip: Any = 0.0  # probability of going to either side of the intended direction instead, half each
    step_reward: Any = -1.0
    goal_reward: Any = 0.0  # in place of the step's
    cliff_reward: Any = -100.0
    max_steps_in_episode: Any = 200


class Grid(environment.Environment[EnvState, EnvParams]):
    """A grid world. Its observation is the cell's number, its actions are `MOVES`.

    Args:
        layout: a drawing.
        options: what of `EnvParams` is not as usual.

    Raises:
        UserError: if the drawing is no rectangle, or has no start or no goal.
    """

    def __init__(self, layout: str, **options: Any):
        super().__init__()
        self.layout = _parse(layout)
        self.options = options
        self.height, self.width = self.layout.shape
        self.num_cells = self.layout.size
        flat = self.layout.ravel()
        self.walls, self.goals, self.cliffs = flat == "#", flat == "G", flat == "C"
        self.starts = np.flatnonzero(flat == "S")
        self.next_cell = _next_cells(self.layout)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(**self.options)

    def step_env(
        self, key: jax.Array, state: EnvState, action: int | float | jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """One move. Episodes end as terminated at a goal; the time limit is the caller's (`is_truncated`)."""
        slip_key, side_key, start_key = jax.random.split(key, 3)
        slips = jax.random.uniform(slip_key) < params.slip
        side = jnp.where(jax.random.bernoulli(side_key), 1, 3)
        direction = (jnp.asarray(action) + jnp.where(slips, side, 0)) % len(MOVES)
        entered = jnp.asarray(self.next_cell)[state.cell, direction]
        fell = jnp.asarray(self.cliffs)[entered]
        terminated = jnp.asarray(self.goals)[entered]
        reward = jnp.where(fell, params.cliff_reward, params.step_reward)
        reward = jnp.where(terminated, params.goal_reward, reward)
        cell = jnp.where(fell, self._start(start_key), entered)
        state = EnvState(cell=cell, time=state.time + 1)
        return self.get_obs(state), state, reward, terminated, {"discount": self.discount(state, params)}

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        state = EnvState(cell=self._start(key), time=0)
        return self.get_obs(state), state

    def _start(self, key: jax.Array) -> jax.Array:
        return jax.random.choice(key, jnp.asarray(self.starts, jnp.int32))

    def get_obs(self, state: EnvState, params: EnvParams | None = None, key: jax.Array | None = None):
        return state.cell

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        return jnp.asarray(self.goals)[state.cell]

    def model(
        self, params: EnvParams | None = None
    ) -> tuple[Float[np.ndarray, "S A S"], Float[np.ndarray, "S A"], Bool[np.ndarray, " S"]]:
        """The Markov decision process: transition probabilities, mean rewards, and which states are terminal.

        A terminal state's own rows lead to itself without reward; walls likewise, which nobody enters.
        """
        params = params or self.default_params
        cells, actions = self.num_cells, len(MOVES)
        transition, reward = np.zeros((cells, actions, cells)), np.zeros((cells, actions))
        entered_reward = np.where(self.cliffs, params.cliff_reward, params.step_reward)
        entered_reward = np.where(self.goals, params.goal_reward, entered_reward)
        turns = ((0, 1 - params.slip), (1, params.slip / 2), (3, params.slip / 2))
        for cell in range(cells):
            for action in range(actions):
                if self.goals[cell] or self.walls[cell]:
                    transition[cell, action, cell] = 1
                    continue
                for turn, probability in turns:
                    entered = self.next_cell[cell, (action + turn) % actions]
                    reached = self.starts if self.cliffs[entered] else np.array([entered])
                    transition[cell, action, reached] += probability / len(reached)
                    reward[cell, action] += probability * entered_reward[entered]
        return transition, reward, self.goals.copy()

    @property
    def name(self) -> str:
        return "Grid"

    @property
    def num_actions(self) -> int:
        return len(MOVES)

    def action_space(self, params: EnvParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(len(MOVES))

    def observation_space(self, params: EnvParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_cells)


# Environments by name. The cliff is Sutton & Barto's, but that the last move is free.
GRIDS = {
    "Cliff": functools.partial(Grid, CLIFF),
    "Rooms": functools.partial(Grid, ROOMS, slip=0.2, cliff_reward=-20.0, goal_reward=10.0),
}


def _parse(layout: str) -> np.ndarray:
    """The characters of a drawing, [height, width]."""
    rows = [line.strip() for line in layout.strip().splitlines()]
    if len({len(row) for row in rows}) != 1:
        raise UserError(f"the lines of a grid must be equally long, not {[len(row) for row in rows]}")
    cells = np.array([list(row) for row in rows])
    for mark, meaning in (("S", "start"), ("G", "goal")):
        if not (cells == mark).any():
            raise UserError(f"the grid has no {meaning}: mark one with {mark}")
    return cells


def _next_cells(layout: np.ndarray) -> Int[np.ndarray, "S A"]:
    """Where each move from each cell leads when it doesn't slip, cliffs as the cells they are."""
    height, width = layout.shape
    table = np.empty((layout.size, len(MOVES)), np.int32)
    for row in range(height):
        for column in range(width):
            for action, (down, right) in enumerate(MOVES):
                there = (row + down, column + right)
                inside = 0 <= there[0] < height and 0 <= there[1] < width
                target = there if inside and layout[there] != "#" else (row, column)
                table[row * width + column, action] = target[0] * width + target[1]
    return table


def value_iteration(
    transition: Float[np.ndarray, "S A S"],
    reward: Float[np.ndarray, "S A"],
    terminal: Bool[np.ndarray, " S"],
    gamma: float | int,
    tolerance: float = 1e-10,
) -> Float[np.ndarray, "S A"]:
    """The optimal action values (Bellman 1957), to `tolerance` in the largest entry; 0 in terminal states.

    `gamma` below 1, or each state reaches a terminal one under some policy, or this never ends.
    """
    values = np.zeros_like(reward)
    while True:
        best = np.where(terminal, 0.0, values.max(1))
        updated = np.where(terminal[:, None], 0.0, reward + gamma * transition @ best)
        if np.abs(updated - values).max() <= tolerance:
            return updated
        values = updated
