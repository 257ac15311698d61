"""The wrapper over environments: ends of episodes, actions, names; and the environment of sentences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from core.errors import UserError
from rl.envs import tokens
from rl.envs.wrapper import Continuous, Discrete, make


def run(env, actions, state=None, seed=0):
    """Each step's results, stacked."""
    first, fresh = env.reset(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(actions))

    def step(carry, now):
        observation, state, *rest = env.step(now[0], carry, now[1])
        return state, (observation, *rest)

    _, results = jax.jit(lambda s: jax.lax.scan(step, s, (keys, actions)))(fresh if state is None else state)
    return first, results


def test_a_termination_and_what_comes_after_it():
    """CartPole pushed one way falls: the final observation is the fallen pole's, the next a fresh one's."""
    env = make("CartPole-v1")
    assert env.actions == Discrete(2) and env.observation_shape == (4,) and env.max_steps == 500
    _, (observation, reward, terminated, truncated, info) = run(env, jnp.ones(30, jnp.int32))
    end = int(terminated.argmax())
    assert 5 < end < 15 and not truncated.any()
    assert abs(info["final_observation"][end, 2]) > 12 * np.pi / 180
    assert np.abs(observation[end]).max() <= 0.05
    assert_allclose(info["final_observation"][:end], observation[:end])  # while it goes on, the same
    assert info["episode_return"][end] == info["episode_length"][end] == end + 1
    assert info["episode_length"][end + 1] == 1
    assert_allclose(reward, 1)


def test_a_time_limit_is_no_termination():
    env = make("Pendulum-v1")
    _, (observation, reward, terminated, truncated, info) = run(env, jnp.zeros((401, 1)))
    assert not terminated.any()
    assert np.flatnonzero(truncated).tolist() == [199, 399]
    assert_allclose(info["episode_return"][199], reward[:200].sum(), rtol=1e-5)
    assert np.abs(info["final_observation"][199] - observation[199]).max() > 1e-3


def test_actions_are_scaled_and_cut_at_the_boundary():
    """In [-1, 1] for the learner, torque up to 2 for the pendulum: seen in what it costs."""
    env = make("Pendulum-v1")
    assert env.actions == Continuous(1)
    _, state = env.reset(jax.random.key(0))
    upright = state._replace(inner=state.inner.replace(theta=jnp.float32(0), theta_dot=jnp.float32(0)))
    for action, torque in ((0.5, 1.0), (-1.0, -2.0), (7.0, 2.0)):
        _, after, reward, *_ = env.step(jax.random.key(1), upright, jnp.float32([action]))
        assert_allclose(reward, -0.001 * torque**2, rtol=1e-5)
        assert_allclose(after.inner.last_u, torque, rtol=1e-6)


def test_an_unknown_environment_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"'Cartpole-v1' is not known; did you mean CartPole-v1\?"):
        make("Cartpole-v1")
    with pytest.raises(UserError, match=r"known are Acrobot-v1, .*, Sentences"):
        make("zzz")


def ids(sentence):
    words = sentence.split()
    row = [tokens.VOCABULARY.index(word) for word in words] + [-1] * (tokens.LENGTH - len(words))
    return jnp.array(row)


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("the old cat sees a dog .", 7),
        ("a quick fox likes the bird .", 7),
        ("the old cat sees a cat .", 5),  # the same noun
        ("cat sees the dog .", 0),
        ("the old .", 2),  # too short
        ("the old cat sees a dog dog", 6),  # no end
    ],
)
def test_a_sentence_is_judged_at_its_end(sentence, right):
    env = make("Sentences")
    row = ids(sentence)
    length = int((row >= 0).sum())
    _, (observation, reward, terminated, truncated, info) = run(env, row[:length])
    assert terminated.tolist() == [False] * (length - 1) + [True] and not truncated.any()
    assert_allclose(reward, [0.0] * (length - 1) + [right / 7], rtol=1e-6)
    shown = np.asarray(info["final_observation"][-1]).reshape(tokens.LENGTH, -1)  # the tokens so far
    assert_allclose(shown, np.asarray(jax.nn.one_hot(row, len(tokens.VOCABULARY))))
    assert not observation[-1].any()
    assert tokens.text(row) == sentence.replace(" .", ".")
