"""Deep Q-learning (Mnih et al. 2015): double (van Hasselt et al. 2016), dueling, with prioritized replay."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from core.errors import UserError
from core.module import Blueprint, Params
from rl import replay, stepping
from rl.algorithm import Algorithm, State, episode_metrics
from rl.config import Experiment
from rl.envs import normalize
from rl.envs.normalize import Moments
from rl.envs.wrapper import Discrete, Env
from rl.options import DQNConfig
from rl.replay import Replay, Transition
from rl.stepping import Stream
from rl.value_networks import QNetwork


class Agent(NamedTuple):
    """What acting needs. Without normalization the moments stay empty."""

    params: Params
    moments: Moments


class Training(NamedTuple):
    target: Params
    optimizer: optax.OptState
    replay: Replay
    stream: Stream
    held: Int[Array, " B"]  # the action that each environment explores with, -1 for none
    steps: Int[Array, ""]  # of the environments, over all of them
    key: PRNGKeyArray


class Learned(NamedTuple):
    """What gradient steps change."""

    params: Params
    optimizer: optax.OptState
    tree: Float[Array, " nodes"] | None  # of prioritized replay
    highest: Float[Array, ""] | None


def make(config: Experiment, env: Env) -> Algorithm:
    """DQN by `config.dqn` in `env`.

    Raises:
        UserError: if the environment's actions are continuous, or rewards are to be normalized.
    """
    options = config.dqn
    assert options is not None
    if not isinstance(env.actions, Discrete):
        raise UserError(f"dqn chooses among actions, and those of {env.name} are continuous: use ddpg or ppo")
    stepping.refuse_normalized_rewards(config)
    actions = env.actions.n
    network = Blueprint.of(
        lambda rngs: QNetwork(env.observation_shape, actions, options.hidden, options.dueling, rngs)
    )
    gradient_steps = learning_updates(config.updates, options) * options.gradient_steps
    rate: Any = options.learning_rate
    if options.anneal:
        rate = optax.linear_schedule(rate, 0.0, gradient_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optax.adam(rate))

    def values(params: Params, moments: Moments, observation: jax.Array) -> Float[Array, "B A"]:
        return network.bind(params)(normalize.normalize(moments, observation))

    def init(key: PRNGKeyArray) -> State:
        params_key, env_key, key = jax.random.split(key, 3)
        params = network.init(params_key)
        held = replay.init(stepping.example(env), options.replay_size, options.prioritized is not None)
        stream = stepping.start(env, env_key, options.environments)
        moments = normalize.no_moments(env.observation_shape)
        return State(
            Agent(params, moments),
            Training(
                params,
                optimizer.init(params),
                held,
                stream,
                nothing_held(options.environments),
                jnp.int32(0),
                key,
            ),
        )

    def act(agent: Agent, observation: jax.Array, key: PRNGKeyArray, greedy: bool) -> Int[Array, " B"]:
        epsilon = 0.0 if greedy else options.epsilon_final
        return explore(agent, observation, nothing_held(len(observation)), epsilon, key)[0]

    def explore(
        agent: Agent,
        observation: jax.Array,
        held: Int[Array, " B"],
        epsilon: Float[Array, ""] | float,
        key: PRNGKeyArray,
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Actions, and those of them that explore; -1 where the best one was taken."""
        best = values(agent.params, agent.moments, observation).argmax(-1).astype(jnp.int32)
        hold_key, begin_key, any_key = jax.random.split(key, 3)
        hold = (held >= 0) & (jax.random.uniform(hold_key, best.shape) < 1 - 1 / options.epsilon_hold)
        begin = jax.random.uniform(begin_key, best.shape) < epsilon
        anything = jax.random.randint(any_key, best.shape, 0, actions)
        held = jnp.where(hold, held, jnp.where(begin, anything, -1))
        return jnp.where(held >= 0, held, best), held

    def collect(agent: Agent, training: Training, key: PRNGKeyArray):
        """`train_every` steps with one policy: the state after them, transitions [T, B], figures."""

        def step(training: Training, key: PRNGKeyArray):
            act_key, env_key = jax.random.split(key)
            shown = training.stream.observation
            epsilon = stepping.epsilon(config, training.steps)
            chosen, held = explore(agent, shown, training.held, epsilon, act_key)
            stream, seen, truncated, info = stepping.advance(env, training.stream, env_key, chosen)
            done = seen.terminated | truncated
            steps = training.steps + options.environments
            training = training._replace(stream=stream, held=jnp.where(done, -1, held), steps=steps)
            return training, (seen, episode_metrics(done, info))

        keys = jax.random.split(key, options.train_every // options.environments)
        training, (seen, ended) = jax.lax.scan(step, training, keys)
        return training, seen, {name: figure.sum() for name, figure in ended.items()}

    def loss_of(
        params: Params, target: Params, moments: Moments, items: Transition, weights: Float[Array, " B"]
    ) -> tuple[Float[Array, ""], tuple[Float[Array, " B"], Float[Array, ""]]]:
        """Half the mean squared temporal difference; the differences and the mean value.

        Squares, where Mnih et al. clip errors at 1: steps that end an episode are rare, and with so little
        pull each they lost, on the mountain car, to values that rose into the thousands.
        """
        following = values(target, moments, items.next_observation)
        chooser = values(params, moments, items.next_observation) if options.double else following
        best = jnp.take_along_axis(following, chooser.argmax(-1)[:, None], -1)[:, 0]
        wanted = items.reward + options.gamma * ~items.terminated * best
        value = values(params, moments, items.observation)
        taken = jnp.take_along_axis(value, items.action[:, None], -1)[:, 0]
        errors = taken - jax.lax.stop_gradient(wanted)
        return (weights * 0.5 * errors**2).mean(), (errors, taken.mean())

    def learn(
        learned: Learned, ring: Any, target: Params, moments: Moments, steps: jax.Array, key: PRNGKeyArray
    ) -> tuple[Learned, dict[str, jax.Array]]:
        """`gradient_steps` steps, and the means of their figures."""

        def step(learned: Learned, key: PRNGKeyArray):
            params, state = learned.params, learned.optimizer
            held = Replay(ring, learned.tree, learned.highest)
            beta: Any = 1.0
            if options.prioritized is not None:
                beta = stepping.linear(steps, options.prioritized.beta, 1.0, config.train.steps)
            batch = replay.sample(held, key, options.batch_size, beta)
            (loss, (errors, value)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
                params, target, moments, stepping.divide(batch.items), batch.weights
            )
            changes, state = optimizer.update(gradients, state, params)
            if options.prioritized is not None and batch.indices is not None:
                held = replay.prioritize(held, batch.indices, errors, options.prioritized.alpha)
            figures = {"loss": loss, "value": value, "grad_norm": optax.tree.norm(gradients)}
            params = optax.apply_updates(params, changes)
            return Learned(params, state, held.tree, held.highest), figures

        learned, figures = jax.lax.scan(step, learned, jax.random.split(key, options.gradient_steps))
        return learned, {name: figure.mean() for name, figure in figures.items()}

    def update(state: State) -> tuple[State, dict[str, jax.Array]]:
        agent, training = state
        key, collect_key, learn_key = jax.random.split(training.key, 3)
        training, seen, metrics = collect(agent, training, collect_key)
        steps, moments = training.steps, agent.moments
        if config.env.normalize_observation:
            moments = normalize.merge(moments, seen.observation)
        held = replay.add(training.replay, stepping.flat(seen))
        learned = Learned(agent.params, training.optimizer, held.tree, held.highest)
        learned, figures = stepping.once(
            steps >= options.learning_starts,
            lambda learned: learn(learned, held.ring, training.target, moments, steps, learn_key),
            learned,
        )
        renew = steps % options.target_every == 0
        target = jax.tree.map(lambda new, old: jnp.where(renew, new, old), learned.params, training.target)
        held = Replay(held.ring, learned.tree, learned.highest)
        metrics |= figures | {"epsilon": stepping.epsilon(config, steps)}
        training = training._replace(target=target, optimizer=learned.optimizer, replay=held, key=key)
        return State(Agent(learned.params, moments), training), metrics

    def value(agent: Agent, observation: jax.Array) -> Float[Array, " B"]:
        return values(agent.params, agent.moments, observation).max(-1)

    return Algorithm(init, update, act, value)


def learning_updates(updates: int, options: DQNConfig) -> int:
    """How many of a run's updates learn."""
    before = max(1, math.ceil(options.learning_starts / options.train_every)) - 1
    return updates - before


def nothing_held(environments: int) -> Int[Array, " B"]:
    """No environment explores."""
    return jnp.full(environments, -1, jnp.int32)
