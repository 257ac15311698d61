"""Deep deterministic policy gradient (Lillicrap et al. 2015, arXiv:1509.02971).

Actions are in [-1, 1] throughout; the environment's wrapper scales them.
"""

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
from rl.envs.wrapper import Continuous, Env
from rl.replay import Replay, Transition
from rl.stepping import Stream
from rl.value_networks import Actor, Critic

THETA, STEP = 0.15, 0.01  # of the Ornstein-Uhlenbeck process
SETTLED = (THETA * (2 - THETA * STEP)) ** -0.5  # its deviation, once settled, over that of its diffusion


class Agent(NamedTuple):
    """What acting needs, and what the critic says of it. Without normalization the moments stay empty."""

    actor: Params
    critic: Params
    moments: Moments


class Learned(NamedTuple):
    """What gradient steps change."""

    actor: Params
    critic: Params
    target_actor: Params
    target_critic: Params
    actor_optimizer: optax.OptState
    critic_optimizer: optax.OptState


class Training(NamedTuple):
    learned: Learned
    replay: Replay
    stream: Stream
    noise: Float[Array, "B A"]  # the process's state
    steps: Int[Array, ""]  # of the environments, over all of them
    key: PRNGKeyArray


def make(config: Experiment, env: Env) -> Algorithm:
    """DDPG by `config.ddpg` in `env`.

    Raises:
        UserError: if the environment's actions are discrete, or rewards are to be normalized.
    """
    options = config.ddpg
    assert options is not None
    if not isinstance(env.actions, Continuous):
        raise UserError(
            f"ddpg needs continuous actions, and those of {env.name} are discrete: use dqn or ppo"
        )
    stepping.refuse_normalized_rewards(config)
    shape, size = env.observation_shape, env.actions.size
    actor_of = Blueprint.of(lambda rngs: Actor(shape, size, options.hidden, rngs))
    critic_of = Blueprint.of(lambda rngs: Critic(shape, size, options.hidden, rngs))
    actor_optimizer, critic_optimizer = optax.adam(options.actor_rate), optax.adam(options.critic_rate)

    def policy(params: Params, moments: Moments, observation: jax.Array) -> Float[Array, "B A"]:
        return actor_of.bind(params)(normalize.normalize(moments, observation))

    def worth(
        params: Params, moments: Moments, observation: jax.Array, action: Float[Array, "B A"]
    ) -> Float[Array, " B"]:
        return critic_of.bind(params)(normalize.normalize(moments, observation), action)

    def init(key: PRNGKeyArray) -> State:
        actor_key, critic_key, env_key, key = jax.random.split(key, 4)
        actor, critic = actor_of.init(actor_key), critic_of.init(critic_key)
        learned = Learned(
            actor, critic, actor, critic, actor_optimizer.init(actor), critic_optimizer.init(critic)
        )
        held = replay.init(stepping.example(env), options.replay_size)
        stream = stepping.start(env, env_key, options.environments)
        noise = jnp.zeros((options.environments, size))
        agent = Agent(actor, critic, normalize.no_moments(shape))
        return State(agent, Training(learned, held, stream, noise, jnp.int32(0), key))

    def act(agent: Agent, observation: jax.Array, key: PRNGKeyArray, greedy: bool) -> Float[Array, "B A"]:
        action = policy(agent.actor, agent.moments, observation)
        if greedy:
            return action
        scale = options.noise_scale  # the process's steps are drawn alone here, each as when it has settled
        if options.noise == "ornstein_uhlenbeck":
            scale *= SETTLED
        return jnp.clip(action + scale * jax.random.normal(key, action.shape), -1.0, 1.0)

    def explore(
        agent: Agent, observation: jax.Array, noise: Float[Array, "B A"], alone: jax.Array, key: PRNGKeyArray
    ) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
        """Actions and the noise's next state. `alone`: without the policy."""
        action = policy(agent.actor, agent.moments, observation)
        if options.noise == "gaussian":
            noise = options.noise_scale * jax.random.normal(key, action.shape)
            first = jax.random.uniform(key, action.shape, minval=-1.0, maxval=1.0)
        else:
            kick = options.noise_scale * math.sqrt(STEP) * jax.random.normal(key, action.shape)
            first = noise = noise * (1 - THETA * STEP) + kick
        return jnp.clip(jnp.where(alone, first, action + noise), -1.0, 1.0), noise

    def collect(agent: Agent, training: Training, key: PRNGKeyArray):
        """`train_every` steps with one policy: stream and noise after them, transitions [T, B], figures."""
        alone = training.steps < options.learning_starts

        def step(carry: tuple[Stream, jax.Array], key: PRNGKeyArray):
            stream, noise = carry
            act_key, env_key = jax.random.split(key)
            action, noise = explore(agent, stream.observation, noise, alone, act_key)
            stream, seen, truncated, info = stepping.advance(env, stream, env_key, action)
            done = seen.terminated | truncated
            noise = jnp.where(done[:, None], 0.0, noise)  # each episode has a process of its own
            return (stream, noise), (seen, episode_metrics(done, info))

        keys = jax.random.split(key, options.train_every // options.environments)
        (stream, noise), (seen, ended) = jax.lax.scan(step, (training.stream, training.noise), keys)
        return stream, noise, seen, {name: figure.sum() for name, figure in ended.items()}

    def critic_loss(critic: Params, learned: Learned, moments: Moments, items: Transition):
        """Mean squared temporal difference, and the mean value."""
        following = policy(learned.target_actor, moments, items.next_observation)
        best = worth(learned.target_critic, moments, items.next_observation, following)
        wanted = items.reward + options.gamma * ~items.terminated * best
        taken = worth(critic, moments, items.observation, items.action)
        return ((taken - wanted) ** 2).mean(), taken.mean()

    def actor_loss(actor: Params, critic: Params, moments: Moments, items: Transition) -> Float[Array, ""]:
        action = policy(actor, moments, items.observation)
        return -worth(critic, moments, items.observation, action).mean()

    def learn(learned: Learned, ring: Any, moments: Moments, key: PRNGKeyArray):
        """`gradient_steps` steps, and the means of their figures."""

        def step(learned: Learned, key: PRNGKeyArray) -> tuple[Learned, dict[str, jax.Array]]:
            items = stepping.divide(replay.sample(Replay(ring, None, None), key, options.batch_size).items)
            (loss, mean), gradients = jax.value_and_grad(critic_loss, has_aux=True)(
                learned.critic, learned, moments, items
            )
            changes, critic_state = critic_optimizer.update(gradients, learned.critic_optimizer)
            critic = optax.apply_updates(learned.critic, changes)
            gradients = jax.grad(actor_loss)(learned.actor, critic, moments, items)
            changes, actor_state = actor_optimizer.update(gradients, learned.actor_optimizer)
            actor = optax.apply_updates(learned.actor, changes)
            learned = Learned(
                actor,
                critic,
                optax.incremental_update(actor, learned.target_actor, options.tau),
                optax.incremental_update(critic, learned.target_critic, options.tau),
                actor_state,
                critic_state,
            )
            return learned, {"loss": loss, "value": mean, "actor_grad_norm": optax.tree.norm(gradients)}

        learned, figures = jax.lax.scan(step, learned, jax.random.split(key, options.gradient_steps))
        return learned, {name: figure.mean() for name, figure in figures.items()}

    def update(state: State) -> tuple[State, dict[str, jax.Array]]:
        agent, training = state
        key, collect_key, learn_key = jax.random.split(training.key, 3)
        stream, noise, seen, metrics = collect(agent, training, collect_key)
        steps = training.steps + options.train_every
        moments = agent.moments
        if config.env.normalize_observation:
            moments = normalize.merge(moments, seen.observation)
        held = replay.add(training.replay, stepping.flat(seen))
        learned, figures = stepping.once(
            steps >= options.learning_starts,
            lambda learned: learn(learned, held.ring, moments, learn_key),
            training.learned,
        )
        training = Training(learned, held, stream, noise, steps, key)
        return State(Agent(learned.actor, learned.critic, moments), training), metrics | figures

    def value(agent: Agent, observation: jax.Array) -> Float[Array, " B"]:
        action = policy(agent.actor, agent.moments, observation)
        return worth(agent.critic, agent.moments, observation, action)

    return Algorithm(init, update, act, value)
