"""`python -m rl.maps --run R`: what an agent expects of each state and does there, if states make a plane."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core import devices, log
from core.errors import UserError, require, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rl.envs.grid import Grid
    from rl.start import Trained

_POINTS = 121  # along each axis


class Axis(NamedTuple):
    name: str
    least: float
    most: float

    @property
    def points(self) -> np.ndarray:
        return np.linspace(self.least, self.most, _POINTS)


class Plane(NamedTuple):
    """The states of an environment as points of a plane, and what its actions are called."""

    across: Axis
    up: Axis
    observe: Callable[[np.ndarray, np.ndarray], np.ndarray]  # two coordinates [N] -> observations [N, ...]
    action: str
    scale: float = 1.0  # of continuous actions
    choices: tuple[str, ...] = ()


def _pair(across: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([across, up], 1)


def _pendulum(angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle), speed], 1)


_CAR = Axis("position", -1.2, 0.6), Axis("velocity", -0.07, 0.07), _pair
PLANES = {
    "Pendulum-v1": Plane(
        Axis("angle from upright (rad)", -math.pi, math.pi),
        Axis("speed (rad/s)", -8, 8),
        _pendulum,
        "torque",
        2,
    ),
    "MountainCar-v0": Plane(*_CAR, "push", choices=("left", "none", "right")),
    "MountainCarContinuous-v0": Plane(*_CAR, "force"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rl.maps", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run's folder")
    parser.add_argument("--seed", type=int, metavar="S", help="which of the run's agents; default: its first")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: plots/maps.png in the run's folder"
    )
    args = parser.parse_args(argv)
    if args.out and args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: the name of a PNG ends in .png")
    require("rl", "gymnax", "flashbax", "six")
    log.setup("rl")
    devices.prepare()
    from rl.start import agent_of, load_trained  # only now, so that --help answers at once

    trained = load_trained(args.run)
    path = args.out or args.run / "plots" / "maps.png"
    draw(trained, agent_of(trained, args.seed), path)
    print(path)


def draw(trained: Trained, agent: Any, path: Path) -> None:
    """Draw the maps of one of its agents as a PNG at `path`.

    Raises:
        UserError: for an environment whose states are no plane.
    """
    from core.plots import new_figure, save
    from rl.envs.grid import Grid

    world = trained.env.inner
    if isinstance(world, Grid):
        figure = new_figure(0.6 * world.width + 1.5, 0.6 * world.height + 0.6)
        _draw_grid(figure.subplots(), world, *_ask(trained, agent, np.arange(world.num_cells)))
    elif trained.env.name in PLANES:
        figure = new_figure(11, 4.2)
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_plane(left, right, PLANES[trained.env.name], lambda states: _ask(trained, agent, states))
    else:
        drawn = [*PLANES, "grids"]
        raise UserError(
            f"{trained.env.name} has no map: its states are no plane, as those of {', '.join(drawn)}"
        )
    save(figure, path)


def _ask(trained: Trained, agent: Any, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [N] and greedy actions [N, ...] of observations [N, ...]."""
    import jax
    import jax.numpy as jnp

    shown = jnp.asarray(observations, jnp.float32)
    algorithm = trained.algorithm
    actions = algorithm.act(agent, shown, jax.random.key(0), True)
    return np.asarray(algorithm.value(agent, shown)), np.asarray(actions)


def _draw_plane(
    left: Axes, right: Axes, plane: Plane, ask: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> None:
    across, up = plane.across, plane.up
    x, y = np.meshgrid(across.points, up.points)
    values, actions = ask(plane.observe(x.ravel(), y.ravel()))
    image: dict[str, Any] = {"extent": (*across[1:], *up[1:]), "origin": "lower", "aspect": "auto"}
    shown = left.imshow(values.reshape(x.shape), cmap="viridis", **image)
    left.figure.colorbar(shown, ax=left, label="value")
    actions = actions.reshape(x.shape) * plane.scale
    if plane.choices:
        shown = right.imshow(
            actions, cmap=_shades(len(plane.choices)), vmin=-0.5, vmax=len(plane.choices) - 0.5, **image
        )
        bar = right.figure.colorbar(shown, ax=right, label=plane.action, ticks=range(len(plane.choices)))
        bar.ax.set_yticklabels(plane.choices)
    else:
        shown = right.imshow(actions, cmap="RdBu", vmin=-plane.scale, vmax=plane.scale, **image)
        right.figure.colorbar(shown, ax=right, label=plane.action)
    left.set_ylabel(up.name)
    for axes in (left, right):
        axes.set_xlabel(across.name)


def _shades(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["RdBu"].resampled(count)


def _draw_grid(axes: Axes, world: Grid, values: np.ndarray, actions: np.ndarray) -> None:
    """Values as shades and greedy moves as arrows; walls and cliffs, where nobody stays, are blank."""
    from rl.envs.grid import ARROWS

    empty = world.walls | world.cliffs | world.goals
    shape = (world.height, world.width)
    shown = axes.imshow(np.ma.masked_array(values, empty).reshape(shape), cmap="viridis")
    axes.figure.colorbar(shown, ax=axes, label="value")
    bright = values > (values[~empty].min() + values[~empty].max()) / 2
    for cell in range(world.num_cells):
        row, column = divmod(cell, world.width)
        mark = world.layout[row, column] if empty[cell] else ARROWS[actions[cell]]
        axes.text(
            column,
            row,
            mark,
            ha="center",
            va="center",
            color="black" if empty[cell] or bright[cell] else "white",
        )
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    run_command(main)
