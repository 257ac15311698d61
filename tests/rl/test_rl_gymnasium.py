"""gymnax behind our wrapper against Gymnasium, step for step from the same states with the same actions.

States are set equal at each step, since Acrobot's rounding (float32 here, float64 there) grows without bound.
Whole episodes are compared, so that the ends that tasks have and those of time limits are among the steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.classic_control import acrobot, cartpole, mountain_car, pendulum
from gymnax.environments.classic_control import continuous_mountain_car as continuous

from rl.envs import wrapper
from rl.envs.wrapper import EnvState

gymnasium = pytest.importorskip("gymnasium")


def _balance(observation, t, rng):
    return int(observation[2] + 0.5 * observation[3] + 0.05 * observation[0] + 0.1 * observation[1] > 0)


def _choice(n):
    return lambda observation, t, rng: int(rng.integers(n))


def _swing(observation, t, rng):
    return 2 if observation[1] >= 0 else 0


def _push(observation, t, rng):
    return np.float32([1.0 if observation[1] >= 0 else -1.0])


def _wander(high):
    return lambda observation, t, rng: np.float32([np.clip(1.2 * high * np.sin(t / 9), -high, high)])


def _left(observation, t, rng):
    """Swings far enough to run into the wall on the left, and then stays there."""
    return np.float32([1.0 if observation[1] >= 0 and t < 25 else -1.0])


STATES = {
    "CartPole-v1": lambda s, t: cartpole.EnvState(
        time=t, x=s[:, 0], x_dot=s[:, 1], theta=s[:, 2], theta_dot=s[:, 3]
    ),
    "Acrobot-v1": lambda s, t: acrobot.EnvState(
        time=t, joint_angle1=s[:, 0], joint_angle2=s[:, 1], velocity_1=s[:, 2], velocity_2=s[:, 3]
    ),
    "MountainCar-v0": lambda s, t: mountain_car.EnvState(time=t, position=s[:, 0], velocity=s[:, 1]),
    "MountainCarContinuous-v0": lambda s, t: continuous.EnvState(time=t, position=s[:, 0], velocity=s[:, 1]),
    "Pendulum-v1": lambda s, t: pendulum.EnvState(
        time=t, theta=s[:, 0], theta_dot=s[:, 1], last_u=jnp.zeros(len(t))
    ),
}


def _episode(name, policy, seed):
    """Gymnasium's states before each step, actions, observations after, rewards, terminated, truncated."""
    env, rng = gymnasium.make(name), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    steps, over = [], False
    while not over:
        state = np.array(env.unwrapped.state)
        action = policy(observation, len(steps), rng)
        observation, reward, terminated, truncated, _ = env.step(action)
        steps.append((state, action, observation, reward, terminated, truncated))
        over = terminated or truncated
    return [np.stack(column) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("name", "policy", "ends"),
    [
        ("CartPole-v1", _choice(2), "terminated"),
        ("CartPole-v1", _balance, "truncated"),
        ("Acrobot-v1", _choice(3), "truncated"),
        ("Acrobot-v1", lambda o, t, rng: 0 if o[4] >= 0 else 2, "terminated"),
        ("MountainCar-v0", _choice(3), "truncated"),
        ("MountainCar-v0", _swing, "terminated"),
        ("MountainCarContinuous-v0", _push, "terminated"),
        ("MountainCarContinuous-v0", _left, "truncated"),
        ("Pendulum-v1", _wander(2.0), "truncated"),
    ],
)
def test_the_same_as_gymnasium(name, policy, ends):
    states, actions, observations, rewards, terminated, truncated = _episode(name, policy, seed=3)
    assert (terminated if ends == "terminated" else truncated)[-1]
    env, count = wrapper.make(name), len(rewards)
    if actions.dtype.kind == "f":
        actions = actions / float(np.max(np.asarray(env.inner.action_space(env.params).high)))
    inner = STATES[name](jnp.asarray(states, jnp.float32), jnp.arange(count))
    before = EnvState(inner, jnp.zeros(count), jnp.arange(count))
    keys = jax.random.split(jax.random.key(0), count)
    following, after, *ours, info = jax.jit(jax.vmap(env.step))(keys, before, jnp.asarray(actions))
    np.testing.assert_allclose(info["final_observation"], observations, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(ours[0], rewards, atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(ours[1], terminated)
    np.testing.assert_array_equal(ours[2], truncated)
    # What comes back is the observation itself, but after the last step that of a new episode.
    np.testing.assert_array_equal(following[:-1], info["final_observation"][:-1])
    assert int(after.inner.time[-1]) == 0 and not np.allclose(following[-1], info["final_observation"][-1])


def test_the_wall_on_the_left_is_hit():
    """What the mended environment is for: without it, gymnax's car keeps its speed at the wall."""
    states, *_ = _episode("MountainCarContinuous-v0", _left, seed=3)
    assert (states[:, 0] == np.float32(-1.2)).any()


@pytest.mark.parametrize("name", list(STATES))
def test_spaces_and_time_limits_are_gymnasiums(name):
    env, reference = wrapper.make(name), gymnasium.make(name)
    assert env.observation_shape == reference.observation_space.shape
    assert env.max_steps == reference.spec.max_episode_steps
    if isinstance(env.actions, wrapper.Discrete):
        assert env.actions.n == reference.action_space.n
    else:
        assert (env.actions.size,) == reference.action_space.shape
        space = env.inner.action_space(env.params)
        np.testing.assert_array_equal(jnp.float32(space.high), reference.action_space.high[0])


@pytest.mark.parametrize("name", list(STATES))
def test_episodes_begin_as_gymnasiums_do(name):
    """Least and most of each number of the first state, to 2% of its range, and in no case beyond."""
    reference = gymnasium.make(name)
    first = []
    for seed in range(2000):
        reference.reset(seed=seed)
        first.append(np.array(reference.unwrapped.state))
    first = np.stack(first)
    env = wrapper.make(name)
    _, state = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 4000))
    inner = STATES[name](jnp.zeros((1, 4)), jnp.zeros(1))
    fields = [f for f in vars(inner) if f not in ("time", "last_u")]
    for i, field in enumerate(sorted(fields, key=lambda f: list(vars(inner)).index(f))):
        ours = np.broadcast_to(getattr(state.inner, field), 4000)
        room = 0.02 * np.ptp(first[:, i]) + 1e-6
        assert abs(ours.min() - first[:, i].min()) < room and abs(ours.max() - first[:, i].max()) < room
