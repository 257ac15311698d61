"""Frames of environments, drawn from their states, and GIFs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from core.errors import UserError
from core.plots import BLUE, COLORS, GRID, INK, RED
from rl.envs.grid import GRIDS, Grid
from rl.envs.wrapper import Env

_WIDTH, _HEIGHT = 360, 240
_SCALE = 2  # drawn larger and reduced, which smooths the edges
_FPS = 30

# White where no channel is set. MinAtar's Seaquest has the most channels, ten.
_CHANNELS = (
    "#ffffff", BLUE, RED, "#f3c9cf", COLORS[4], COLORS[2], COLORS[3], COLORS[5], INK, "#a7c7dd", "#bfe0cd",
)  # fmt: skip

Point = tuple[float | int, float | int]


class Canvas:
    """A frame whose coordinates are the environment's: x to the right, y up, in its own units."""

    def __init__(self, x: Point, y_low: float | int):
        self.image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._x, self._y = x[0], y_low
        self._unit = _WIDTH * _SCALE / (x[1] - x[0])  # pixels

    def line(self, points: Sequence[Point], color: str, width: float | int) -> None:
        """A line through points, of a width in the environment's units."""
        at = [self._at(point) for point in points]
        self._draw.line(at, fill=color, width=max(2, round(width * self._unit)), joint="curve")
        if width * self._unit > 6:
            for point in (points[0], points[-1]):
                self.disc(point, width / 2, color)

    def disc(self, center: Point, radius: float | int, color: str) -> None:
        x, y = self._at(center)
        r = radius * self._unit
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def box(self, center: Point, width: float | int, height: float | int, color: str) -> None:
        x, y = self._at(center)
        w, h = width * self._unit / 2, height * self._unit / 2
        self._draw.rectangle((x - w, y - h, x + w, y + h), fill=color)

    def done(self) -> Image.Image:
        return self.image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)

    def _at(self, point: Point) -> tuple[float, float]:
        return (point[0] - self._x) * self._unit, _HEIGHT * _SCALE - (point[1] - self._y) * self._unit


def cart_pole(state: Any) -> Image.Image:
    canvas = Canvas((-2.4, 2.4), -1.0)
    canvas.line([(-2.4, -0.15), (2.4, -0.15)], GRID, 0.02)
    x, theta = float(state.x), float(state.theta)
    canvas.box((x, 0), 0.5, 0.25, INK)
    canvas.line([(x, 0.1), (x + math.sin(theta), 0.1 + math.cos(theta))], RED, 0.09)
    canvas.disc((x, 0.1), 0.06, BLUE)
    return canvas.done()


def pendulum(state: Any) -> Image.Image:
    canvas = Canvas((-2.0, 2.0), -1.33)
    theta, torque = float(state.theta), float(state.last_u)
    canvas.line([(0, 0), (-math.sin(theta), math.cos(theta))], RED, 0.18)
    canvas.disc((0, 0), 0.05, INK)
    canvas.line([(0, -1.25), (torque / 2 * 1.5, -1.25)], BLUE, 0.06)  # the torque, as a bar
    return canvas.done()


def acrobot(state: Any) -> Image.Image:
    canvas = Canvas((-3.6, 3.6), -2.4)
    first, second = float(state.joint_angle1), float(state.joint_angle1 + state.joint_angle2)
    elbow = math.sin(first), -math.cos(first)
    hand = elbow[0] + math.sin(second), elbow[1] - math.cos(second)
    canvas.line([(-3.6, 1), (3.6, 1)], GRID, 0.03)  # to be swung above
    canvas.line([(0, 0), elbow], BLUE, 0.16)
    canvas.line([elbow, hand], RED, 0.16)
    canvas.disc((0, 0), 0.06, INK)
    return canvas.done()


def mountain_car(state: Any) -> Image.Image:
    canvas = Canvas((-1.2, 0.6), -0.1)

    def height(x: float) -> float:
        return math.sin(3 * x) * 0.45 + 0.55

    canvas.line([(x, height(x)) for x in np.linspace(-1.2, 0.6, 100)], INK, 0.01)
    x = float(state.position)
    canvas.line([(0.45, height(0.45)), (0.45, height(0.45) + 0.15)], INK, 0.008)
    canvas.box((0.485, height(0.45) + 0.12), 0.07, 0.05, RED)
    canvas.disc((x, height(x) + 0.04), 0.04, BLUE)
    return canvas.done()


def planes(env: Env, state: Any) -> Image.Image:
    """An observation [rows, columns, channels], a colour for each channel, the first ones in front."""
    shown = np.asarray(env.inner.get_obs(state, env.params))
    channels = shown.reshape(*shown.shape[:2], -1) > 0
    return squares(np.where(channels.any(-1), 1 + channels.argmax(-1), 0), _CHANNELS)


def grid_world(world: Grid, state: Any) -> Image.Image:
    """The walker in blue, goals green, cliffs red, walls dark."""
    cells = np.select([world.walls, world.goals, world.cliffs], [1, 2, 3], 0)
    cells[int(state.cell)] = 4
    return squares(cells.reshape(world.layout.shape), ("#ffffff", INK, COLORS[2], RED, BLUE))


def squares(cells: np.ndarray, colors: Sequence[str]) -> Image.Image:
    """Cells [rows, columns] of indices of colours, as squares."""
    size = _HEIGHT // max(cells.shape)
    palette = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors], np.uint8)
    pixels = palette[cells].repeat(size, 0).repeat(size, 1)
    pixels[::size], pixels[:, ::size] = 228, 228
    return Image.fromarray(pixels)


PICTURES: dict[str, Callable[[Any], Image.Image]] = {
    "CartPole-v1": cart_pole,
    "Pendulum-v1": pendulum,
    "Acrobot-v1": acrobot,
    "MountainCar-v0": mountain_car,
    "MountainCarContinuous-v0": mountain_car,
}


def refuse_unseen(env: Env) -> None:
    """Raises UserError if that environment has no picture."""
    if not (isinstance(env.inner, Grid) or env.name in PICTURES or _shows_planes(env)):
        known = ", ".join([*PICTURES, *GRIDS])
        raise UserError(f"{env.name} has no picture; what has one: {known}, and all that show planes")


def _shows_planes(env: Env) -> bool:
    shape = env.observation_shape
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] < len(_CHANNELS))


def draw(env: Env, state: Any) -> Image.Image:
    """The picture of an environment's own state.

    Raises:
        UserError: if that environment has no picture.
    """
    refuse_unseen(env)
    if isinstance(env.inner, Grid):
        return grid_world(env.inner, state)
    return PICTURES[env.name](state) if env.name in PICTURES else planes(env, state)


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF that begins anew when it is over, its last frame held for a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    each = round(1000 / _FPS / 10) * 10  # GIF counts hundredths of a second
    times = [each] * (len(frames) - 1) + [1000]
    palette = [frame.quantize(32, dither=Image.Dither.NONE) for frame in frames]
    palette[0].save(path, save_all=True, append_images=palette[1:], duration=times, loop=0)
