"""Pictures of environments, looked at cell by cell where they are made of cells."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from core.errors import UserError
from rl.envs.wrapper import make
from rl.pictures import PICTURES, draw


@pytest.mark.parametrize("name", ["Breakout-MinAtar", "SpaceInvaders-MinAtar", "Catch-bsuite"])
def test_an_observation_of_planes_has_a_colour_for_each(name):
    env = make(name)
    observation, state = env.reset(jax.random.key(0))
    shown = np.asarray(observation).reshape(*observation.shape[:2], -1)
    picture = np.asarray(draw(env, state.inner))
    size = len(picture) // len(shown)
    middles = picture[size // 2 :: size, size // 2 :: size]
    assert middles.shape[:2] == shown.shape[:2]
    front = np.where(shown.any(-1), shown.argmax(-1), -1)
    colors = {channel: {tuple(color) for color in middles[front == channel]} for channel in np.unique(front)}
    assert all(len(color) == 1 for color in colors.values()) and len(colors) >= 2
    assert len(set.union(*colors.values())) == len(colors) and colors[-1] == {(255, 255, 255)}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_follows_the_state(name):
    env = make(name)
    first, other = (np.asarray(draw(env, env.reset(jax.random.key(i))[1].inner)) for i in (0, 1))
    assert first.shape == (240, 360, 3) and (first != other).any()
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 2


def test_what_has_no_picture_is_named():
    env = make("BernoulliBandit-misc")
    with pytest.raises(UserError, match=r"BernoulliBandit-misc has no picture; what has one: CartPole-v1"):
        draw(env, env.reset(jax.random.key(0))[1].inner)
