"""PPO through production code: it learns, the same seed gives the same bits, many seeds and devices agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from identity import LENGTH, identity
from numpy.testing import assert_allclose

from core.config import parse
from core.errors import UserError
from core.mesh import make_mesh
from core.options import MeshConfig
from rl import ppo, start
from rl.config import Experiment
from rl.envs.wrapper import make
from rl.evaluate import evaluate
from rl.loop import advance_under, make_programs


def experiment(updates=5, env="CartPole-v1", seeds=1, seed=3, **options):
    normalize = {"normalize_observation": True, "normalize_reward": True}
    settings = {"environments": 8, "rollout": 8, "epochs": 2, "minibatches": 2, "hidden": [16]} | options
    steps = updates * settings["environments"] * settings["rollout"]
    return parse(
        Experiment,
        {
            "run": {"name": "x"},
            "env": {"name": env, **normalize},
            "train": {"steps": steps, "seeds": seeds},
            "seed": seed,
            "ppo": settings,
            "eval": {"episodes": 4},
        },
    )


@functools.cache
def compiled(seeds, devices):
    """The loop's own programs for five updates, and the one that trains, compiled."""
    made = experiment(seeds=seeds)
    env, algorithm = start.build(made)
    programs = make_programs(
        made, env, algorithm, make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    )
    return programs, advance_under(programs, programs.init(start.seeds(made)))


def trained(*seeds, devices=1):
    """The state after five updates and their metrics."""
    programs, advance = compiled(len(seeds), devices)
    return jax.device_get(advance(programs.init(jnp.array(seeds)), 5)[:2])


def leaves(tree):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("shows", "least"), [("one-hot", 0.99 * LENGTH), ("continuous", -0.5)])
def test_identity_is_solved_in_seconds(shows, least):
    made = experiment(
        updates=60, environments=32, rollout=LENGTH, learning_rate=1e-2, gamma=0.0, minibatches=4, epochs=4
    )
    env = identity(shows)
    algorithm = ppo.make(made, env)
    state = jax.jit(
        lambda key: jax.lax.fori_loop(
            0, made.updates, lambda _, s: algorithm.update(s)[0], algorithm.init(key)
        )
    )(jax.random.key(0))
    returns, lengths = evaluate(algorithm, env, state.agent, jax.random.key(1), 50)
    assert (lengths == LENGTH).all()
    assert returns.mean() > least  # of five steps; who always says zero is 0.45 away in each


def test_a_seed_gives_the_same_bits():
    first = trained(3)
    for ours, again in zip(leaves(first), leaves(trained(3)), strict=True):
        np.testing.assert_array_equal(ours, again)
    other, _ = trained(4)
    assert np.abs(leaves(other.agent)[0] - leaves(first[0].agent)[0]).max() > 1e-3


def test_seeds_at_once_equal_single_runs():
    both, alone = trained(2, 3), trained(3)
    for ours, theirs in zip(leaves(both), leaves(alone), strict=True):
        assert_allclose(ours[1], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seeds", [(3,), (3, 4)], ids=["environments", "seeds"])
def test_divided_over_devices_equals_undivided(seeds):
    """One seed: its environments over two devices; two seeds: a device each."""
    for ours, theirs in zip(leaves(trained(*seeds, devices=2)), leaves(trained(*seeds)), strict=True):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_environments_are_divided_over_devices():
    """Results alone wouldn't tell: no device steps all eight environments."""
    text = compiled(1, 2)[1].as_text()
    assert "f32[1,4,4]" in text  # half of the observations of a step
    assert "f32[1,16,16]" in text and "f32[1,32,16]" not in text  # and of the hidden layer of a minibatch


def test_what_does_not_divide_is_named():
    made = experiment(seeds=3)
    env, algorithm = start.build(made)
    with pytest.raises(UserError, match=r"neither train\.seeds \(3\) nor ppo\.environments \(8\) divides"):
        make_programs(made, env, algorithm, make_mesh(MeshConfig(data=5), jax.devices()[:5]))
    made = experiment(seeds=3, environments=10, rollout=5)
    with pytest.raises(UserError, match=r"environments x rollout / minibatches \(25\) divides over"):
        make_programs(made, env, algorithm, make_mesh(MeshConfig(data=2), jax.devices()[:2]))


def test_no_decomposition_is_batched():
    """On a CPU batched ones that run at the same time can wait for each other for ever (jax 0.10.2)."""
    made = experiment(seeds=3)
    _, algorithm = start.build(made)
    text = jax.jit(lambda seeds: start.init(algorithm, seeds)).lower(start.seeds(made)).as_text()
    calls = [line for line in text.splitlines() if "@lapack" in line]
    assert calls and not any("tensor<3x" in line for line in calls)


def test_statistics_grow_in_training_and_stand_still_at_evaluation():
    made = experiment()
    env, algorithm = start.build(made)
    state, _ = trained(3)
    agent = jax.tree.map(lambda x: x[0], state.agent)
    assert agent.moments.seen == made.train.steps
    assert np.abs(agent.moments.mean).max() > 0
    before = leaves(agent)
    first = evaluate(algorithm, env, agent, jax.random.key(0), 4)
    again = evaluate(algorithm, env, agent, jax.random.key(0), 4)
    np.testing.assert_array_equal(first[0], again[0])
    for ours, old in zip(leaves(agent), before, strict=True):
        np.testing.assert_array_equal(ours, old)
    # CartPole gives 1 a step: an evaluation counts that, and not the reward that was learned from.
    np.testing.assert_array_equal(first[0], first[1])


def test_the_first_epoch_meets_the_policy_that_acted():
    """With one epoch of one minibatch no ratio has moved, however observations are normalized by then."""
    made = experiment(updates=2, epochs=1, minibatches=1, environments=2, rollout=4)
    algorithm = ppo.make(made, identity("continuous"))
    update = jax.jit(algorithm.update)
    state, _ = update(algorithm.init(jax.random.key(0)))
    _, metrics = update(state)
    assert state.agent.moments.seen == 8
    assert abs(metrics["kl"]) < 1e-6 and metrics["clip_fraction"] == 0


def test_it_acts_on_images():
    made = experiment(updates=1, env="Breakout-MinAtar", environments=2, rollout=4)
    algorithm = ppo.make(made, make("Breakout-MinAtar"))
    state, metrics = jax.jit(lambda key: algorithm.update(algorithm.init(key)))(jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values())
    assert state.agent.params["actor"]["layers"][0]["kernel"].shape == (10 * 10 * 4, 16)
