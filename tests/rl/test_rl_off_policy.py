"""DQN and DDPG: what they learn from, their updates by hand, that they learn, that runs are reproducible."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from identity import LENGTH, identity

from core.config import parse
from core.errors import UserError
from core.mesh import make_mesh
from core.options import MeshConfig
from rl import ddpg, dqn, q_learning, start, stepping
from rl.config import Experiment
from rl.envs import wrapper
from rl.evaluate import evaluate
from rl.loop import advance_under, make_programs

SMALL: dict[str, dict[str, Any]] = {
    "dqn": {
        "environments": 4,
        "train_every": 16,
        "gradient_steps": 4,
        "target_every": 32,
        "learning_starts": 32,
        "replay_size": 256,
        "batch_size": 16,
        "hidden": [16],
    },
    "ddpg": {
        "environments": 4,
        "train_every": 16,
        "gradient_steps": 4,
        "learning_starts": 32,
        "replay_size": 256,
        "batch_size": 16,
        "hidden": [16],
    },
    "q_learning": {"environments": 4, "train_every": 16},
}
ENVIRONMENTS = {"dqn": "CartPole-v1", "ddpg": "Pendulum-v1", "q_learning": "Rooms"}
MODULES = {"dqn": dqn, "ddpg": ddpg, "q_learning": q_learning}
PRIORITIZED = {"prioritized": {"alpha": 0.6, "beta": 0.4}}


def _experiment(name: str, steps=1600, env: dict[str, Any] | None = None, **options: Any) -> Experiment:
    env = {"name": ENVIRONMENTS[name], **(env or {})}
    section = SMALL[name] | options
    data = {"run": {"name": "t"}, "env": env, "train": {"steps": steps}, name: section}
    return parse(Experiment, data)


def _run(algorithm, state, updates: int):
    def step(state, _):
        return algorithm.update(state)

    return jax.jit(lambda state: jax.lax.scan(step, state, None, length=updates))(state)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("dqn", {"gamma": 0.5, "learning_starts": 160}, 0.99 * LENGTH),
        (
            "dqn",
            {"gamma": 0.5, "learning_starts": 160, "dueling": True, "double": False, **PRIORITIZED},
            0.99 * LENGTH,
        ),
        (
            "ddpg",
            {"gamma": 0.5, "learning_starts": 160, "hidden": [32], "tau": 0.05}
            | {"actor_rate": 3e-3, "critic_rate": 3e-3},
            -0.5,  # who always says zero is 0.45 away in each step
        ),
        ("q_learning", {"gamma": 0.5}, 0.99 * LENGTH),
    ],
)
def test_it_learns_to_give_back_what_it_sees(name, options, least):
    experiment = _experiment(name, steps=8000, **options)
    env = identity({"dqn": "one-hot", "ddpg": "continuous", "q_learning": "number"}[name])
    algorithm = MODULES[name].make(experiment, env)
    state, _ = _run(algorithm, algorithm.init(jax.random.key(0)), 500)
    returns, lengths = evaluate(algorithm, env, state.agent, jax.random.key(1), 100)
    assert returns.mean() >= least, returns.mean()
    assert (lengths == LENGTH).all()


@pytest.mark.parametrize("name", ["dqn", "ddpg"])
def test_replay_holds_final_observations_and_only_true_ends(name):
    """Follow the environments by hand through a whole episode and past its end."""
    experiment = _experiment(name)
    env = wrapper.make(ENVIRONMENTS[name])
    stream = stepping.start(env, jax.random.key(0), 4)
    advance = jax.jit(functools.partial(stepping.advance, env))
    ends = {"terminated": 0, "truncated": 0}
    action = jnp.ones(4, jnp.int32) if name == "dqn" else jnp.ones((4, 1))
    for i in range(experiment.train.steps // 4 // 2):
        key = jax.random.key(i)
        before = stream
        stream, seen, truncated, _ = advance(before, key, action)
        done = seen.terminated | truncated
        # What gymnax's own step without a reset says.
        keys = jax.vmap(lambda k: jax.random.split(k)[0])(jax.random.split(key, 4))
        own = jax.vmap(env._own)(action)
        observation, _, _, terminated, _ = jax.vmap(env.inner.step_env, (0, 0, 0, None))(
            keys, before.env.inner, own, env.params
        )
        np.testing.assert_allclose(seen.next_observation, observation, atol=1e-6)
        np.testing.assert_array_equal(seen.observation, before.observation)
        np.testing.assert_array_equal(seen.terminated, terminated)
        ends["terminated"] += int(terminated.sum())
        ends["truncated"] += int((done & ~terminated).sum())
        for k in np.flatnonzero(done):
            assert not np.allclose(stream.observation[k], seen.next_observation[k])
    assert ends["terminated" if name == "dqn" else "truncated"]
    if name == "ddpg":  # every end of Pendulum is the time limit's
        assert not ends["terminated"]


@pytest.mark.parametrize("options", [{}, {"double": False}, {"dueling": True, **PRIORITIZED}])
def test_the_target_network_is_renewed_at_its_interval(options):
    experiment = _experiment("dqn", **options)
    algorithm = dqn.make(experiment, wrapper.make("CartPole-v1"))
    update = jax.jit(algorithm.update)
    state = algorithm.init(jax.random.key(0))
    equal = lambda a, b: all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    for i in range(1, 7):
        before = state
        state, metrics = update(before)
        learns, renews = 16 * i >= 32, 16 * i % 32 == 0
        assert equal(state.agent.params, before.agent.params) != learns
        assert equal(state.training.target, state.agent.params) == (renews or not learns)
        assert equal(state.training.target, before.training.target) != (renews and learns)
        assert (float(metrics["loss"]) > 0) == learns
        assert int(state.training.steps) == 16 * i


def test_targets_of_ddpg_follow_by_tau():
    experiment = _experiment("ddpg", gradient_steps=1, tau=0.25)
    algorithm = ddpg.make(experiment, wrapper.make("Pendulum-v1"))
    update = jax.jit(algorithm.update)
    state = algorithm.init(jax.random.key(0))
    for _ in range(3):
        before = state.training.learned
        state, _ = update(state)
        after = state.training.learned
        for own, target, old in (
            (after.actor, after.target_actor, before.target_actor),
            (after.critic, after.target_critic, before.target_critic),
        ):
            expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, own, old)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), target, expected
            )
    assert int(state.training.steps) == 48
    np.testing.assert_array_equal(
        *(jax.tree.leaves(tree)[0] for tree in (state.agent.actor, state.training.learned.actor))
    )


CASES = [
    ("dqn", {"dueling": True, "epsilon_hold": 3.0, **PRIORITIZED}),
    pytest.param("ddpg", {"noise": "ornstein_uhlenbeck", "noise_scale": 0.5}, marks=pytest.mark.slow),
    ("q_learning", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_seeds_side_by_side_are_the_runs_alone(name, options):
    """And one seed gives the same bits each time."""
    normal = name != "q_learning"
    experiment = _experiment(name, env={"normalize_observation": normal}, **options)
    algorithm = start.build(experiment)[1]
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    both = jax.vmap(algorithm.update)
    together = jax.jit(lambda s: jax.lax.fori_loop(0, 5, lambda _, s: both(s)[0], s))(
        jax.vmap(algorithm.init)(keys)
    )
    alone = jax.jit(lambda s: jax.lax.fori_loop(0, 5, lambda _, s: algorithm.update(s)[0], s))
    once, again = (alone(algorithm.init(keys[1])) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once.agent, again.agent)
    assert int(once.training.steps) == 80
    assert not normal or float(once.agent.moments.seen) == 80
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-5), together.agent, once.agent
    )
    first = jax.tree.leaves(together.agent)[0]
    assert not np.allclose(first[0], first[1])


@pytest.mark.parametrize(("name", "options"), CASES[:2])
def test_environments_over_two_devices_are_the_same(name, options):
    experiment = _experiment(name, steps=80, **options)
    ends = []
    for devices in (1, 2):
        env, algorithm = start.build(experiment)
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        programs = make_programs(experiment, env, algorithm, mesh)
        state = programs.init(start.seeds(experiment))
        advance = advance_under(programs, state)
        ends.append(jax.device_get(advance(state, 5)[0].agent))
    assert "f32[1,2," in advance.as_text()  # a device's half of the observations of a step
    assert "f32[1,8,16]" in advance.as_text()  # and of the hidden layer of a batch
    assert "f32[1,16,16]" not in advance.as_text()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *ends)


def test_the_rate_of_dqn_ends_at_zero():
    """Whenever learning starts: its schedule is as long as the updates that learn."""
    for starts, learning in ((0, 100), (16, 100), (17, 99), (160, 91), (1600, 1)):
        options = _experiment("dqn", learning_starts=starts).dqn
        assert dqn.learning_updates(100, options) == learning
        assert sum(16 * update >= starts for update in range(1, 101)) == learning


def test_seeds_side_by_side_wait_for_learning_to_start():
    """Under `vmap` a condition would become a choice between two results, and both be computed."""
    algorithm = start.build(_experiment("dqn"))[1]
    states = jax.vmap(lambda seed: algorithm.init(jax.random.key(seed)))(jnp.arange(2))
    branches = [
        equation.params["branches"]
        for equation in jax.make_jaxpr(jax.vmap(algorithm.update))(states).eqns
        if equation.primitive.name == "cond"
    ]
    assert [max(len(branch.eqns) for branch in pair) > 0 for pair in branches] == [True]


def test_held_actions_are_held_as_long_as_asked():
    experiment = _experiment(
        "dqn", steps=16 * 200, epsilon_hold=5.0, epsilon_final=1.0, learning_starts=16 * 200
    )
    algorithm = dqn.make(experiment, wrapper.make("MountainCar-v0"))
    state, _ = _run(algorithm, algorithm.init(jax.random.key(0)), 16)  # 64 steps each, no episode ends
    actions = np.asarray(state.training.replay.ring.experience.action[0]).reshape(64, 4)
    # A run of one of three actions is broken with probability 1/5, two times in three by another action.
    changes = (actions[1:] != actions[:-1]).mean()
    assert abs(changes - 2 / 3 / 5) < 4 * np.sqrt(0.13 * 0.87 / actions.size)


def test_noise_of_the_process_is_its_own_in_each_episode():
    experiment = _experiment(
        "ddpg",
        steps=1600,
        noise="ornstein_uhlenbeck",
        noise_scale=0.5,
        learning_starts=1600,
        replay_size=1600,
    )
    algorithm = ddpg.make(experiment, wrapper.make("Pendulum-v1"))
    state, _ = _run(algorithm, algorithm.init(jax.random.key(0)), 100)  # two episodes each
    actions = np.asarray(state.training.replay.ring.experience.action[0]).reshape(2, 200, 4)
    assert np.abs(actions[:, 0]).max() < 0.25  # one kick of 0.05
    steps = actions[:, 1:] - actions[:, :-1] * (1 - ddpg.THETA * ddpg.STEP)
    inside = (np.abs(actions[:, 1:]) < 1) & (np.abs(actions[:, :-1]) < 1)
    np.testing.assert_allclose(steps[inside].std(), 0.5 * np.sqrt(ddpg.STEP), rtol=0.1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "dqn",
            {"train_every": 18},
            r"train_every \(18\) is not a multiple of environments \(4\).*example 20",
        ),
        ("ddpg", {"train_every": 2}, r"train_every \(2\) is not a multiple of environments \(4\).*example 4"),
        ("dqn", {"target_every": 40}, r"target_every \(40\) is not a multiple of train_every \(16\)"),
        ("dqn", {"steps": 1608}, r"train.steps \(1608\) is not a multiple of the 16 environment steps"),
        ("ddpg", {"replay_size": 15}, r"replay_size \(15\) is smaller than what comes in at once"),
        ("dqn", {"replay_size": 20, "batch_size": 32}, r"or goes out \(batch_size, 32\)"),
        ("dqn", {"learning_starts": 1601}, r"learning_starts \(1601\) is never reached in train.steps"),
        ("dqn", {"target_every": 3200}, r"target_every \(3200\) is never reached in train.steps \(1600\)"),
        ("ddpg", {"hidden": [16, 0]}, r"hidden.*greater than or equal to 1"),
    ],
)
def test_a_misaligned_interval_is_an_error(name, change, message):
    with pytest.raises(UserError, match=message):
        _experiment(name, **change)


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("dqn", {"name": "Pendulum-v1"}, "those of Pendulum-v1 are continuous: use ddpg or ppo"),
        ("ddpg", {"name": "CartPole-v1"}, "those of CartPole-v1 are discrete: use dqn or ppo"),
        ("dqn", {"normalize_reward": True}, "env.normalize_reward is not for dqn"),
        ("ddpg", {"normalize_reward": True}, "env.normalize_reward is not for ddpg"),
    ],
)
def test_what_an_algorithm_cannot_do_is_an_error(name, env, message):
    with pytest.raises(UserError, match=message):
        start.build(_experiment(name, env=env))
