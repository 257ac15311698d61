"""Tabular Q-learning (Watkins 1989) over environments side by side."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from core.errors import UserError
from rl import stepping
from rl.algorithm import Algorithm, State, episode_metrics
from rl.config import Experiment
from rl.envs.wrapper import Discrete, Env
from rl.replay import Transition
from rl.stepping import Stream


class Training(NamedTuple):
    visits: Int[Array, "S A"]  # updates of each pair so far
    stream: Stream
    steps: Int[Array, ""]  # of the environments, over all of them
    key: PRNGKeyArray


def make(config: Experiment, env: Env) -> Algorithm:
    """Q-learning by `config.q_learning` in `env`. The agent is the table of values [S, A].

    Raises:
        UserError: if the environment's states or actions can't be counted, or something is to be normalized.
    """
    options = config.q_learning
    assert options is not None
    if env.states is None or not isinstance(env.actions, Discrete):
        raise UserError(
            f"q_learning keeps a table, and {env.name} has no table of states and actions: use ppo"
        )
    stepping.refuse_normalized_rewards(config)
    if config.env.normalize_observation:
        raise UserError(
            "env.normalize_observation is not for q_learning, whose observations are numbers of states"
        )
    states, actions = env.states, env.actions.n

    def init(key: PRNGKeyArray) -> State:
        env_key, key = jax.random.split(key)
        stream = stepping.start(env, env_key, options.environments)
        visits = jnp.zeros((states, actions), jnp.int32)
        return State(jnp.zeros((states, actions)), Training(visits, stream, jnp.int32(0), key))

    def act(table: Float[Array, "S A"], observation: jax.Array, key: PRNGKeyArray, greedy: bool):
        return explore(table, observation, key, 0.0 if greedy else options.epsilon_final)

    def explore(
        table: Float[Array, "S A"],
        observation: Float[Array, " B"],
        key: PRNGKeyArray,
        epsilon: Float[Array, ""] | float,
    ) -> Int[Array, " B"]:
        which, any_key = jax.random.split(key)
        anything = jax.random.randint(any_key, observation.shape, 0, actions)
        best = table[observation.astype(jnp.int32)].argmax(-1).astype(jnp.int32)
        return jnp.where(jax.random.uniform(which, observation.shape) < epsilon, anything, best)

    def update(state: State) -> tuple[State, dict[str, jax.Array]]:
        def step(carry: tuple[jax.Array, Training], key: PRNGKeyArray):
            table, (visits, stream, steps, own_key) = carry
            act_key, env_key = jax.random.split(key)
            chosen = explore(table, stream.observation, act_key, stepping.epsilon(config, steps))
            stream, seen, truncated, info = stepping.advance(env, stream, env_key, chosen)
            table, visits, errors = improve(table, visits, seen, options.gamma, options.decay)
            metrics = episode_metrics(seen.terminated | truncated, info) | {"error": jnp.abs(errors).mean()}
            training = Training(visits, stream, steps + options.environments, own_key)
            return (table, training), metrics

        key, steps_key = jax.random.split(state.training.key)
        keys = jax.random.split(steps_key, options.train_every // options.environments)
        carry = state.agent, state.training._replace(key=key)
        (table, training), told = jax.lax.scan(step, carry, keys)
        metrics = {name: figure.sum() for name, figure in told.items()}
        metrics |= {"error": told["error"].mean(), "epsilon": stepping.epsilon(config, training.steps)}
        return State(table, training), metrics

    def value(table: Float[Array, "S A"], observation: jax.Array) -> Float[Array, " B"]:
        return table[observation.astype(jnp.int32)].max(-1)

    return Algorithm(init, update, act, value)


def improve(
    table: Float[Array, "S A"],
    visits: Int[Array, "S A"],
    seen: Transition,
    gamma: float | int,
    decay: float | int,
) -> tuple[Float[Array, "S A"], Int[Array, "S A"], Float[Array, " B"]]:
    """The table after a batch of transitions, the visits with it, and the temporal differences.

    Transitions of one pair count as one visit, whose error is their mean: a sum would move the value by more
    than the error once enough environments agree.
    """
    state, following = seen.observation.astype(jnp.int32), seen.next_observation.astype(jnp.int32)
    wanted = seen.reward + gamma * ~seen.terminated * table[following].max(-1)
    errors = wanted - table[state, seen.action]
    counts = jnp.zeros_like(table).at[state, seen.action].add(1)
    sums = jnp.zeros_like(table).at[state, seen.action].add(errors)
    visits = visits + (counts > 0)
    rate = jnp.maximum(visits, 1).astype(jnp.float32) ** -decay
    return table + rate * sums / jnp.maximum(counts, 1), visits, errors
