"""Proximal policy optimization, for discrete and continuous actions.

Schulman et al. 2017 (arXiv:1707.06347), with what implementations agree on (Huang et al. 2022, "The 37
implementation details of PPO"): orthogonal initialization, Adam with epsilon 1e-5, annealed, advantages
normalized in each minibatch, the gradient's norm clipped. It deviates from most in three things: the value of
the last observation stands in for what a time limit cut off; observations are normalized with statistics
that stand still during an update, so that the policy that acted is the one that is compared with; and the
mean of a continuous action goes through a tanh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from core.module import Blueprint, Params
from rl import stepping
from rl.algorithm import Algorithm, State, episode_metrics
from rl.config import Experiment, PPOConfig
from rl.envs import normalize
from rl.envs.wrapper import Env
from rl.losses import normalize_advantages, ppo_clip_loss, value_loss
from rl.networks import ActorCritic
from rl.replay import Transition
from rl.returns import gae
from rl.stepping import Stream


class Agent(NamedTuple):
    params: Params
    moments: normalize.Moments  # of observations; nothing is seen where they aren't normalized


class Training(NamedTuple):
    optimizer: optax.OptState
    stream: Stream
    scale: normalize.RewardScale
    key: jax.Array


class Steps(NamedTuple):
    """What a rollout collects, each leaf [T, B, ...]."""

    seen: Transition
    truncated: jax.Array
    log_prob: jax.Array
    value: jax.Array


class Batch(NamedTuple):
    """What the losses are computed of, each [N, ...]."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    target: jax.Array


def make(experiment: Experiment, env: Env) -> Algorithm:
    """PPO as the experiment's `ppo` says, on `env`."""
    options = experiment.ppo
    assert options is not None
    network = Blueprint.of(
        lambda rngs: ActorCritic(env.observation_shape, env.actions, options.hidden, options.activation, rngs)
    )
    optimizer = make_optimizer(options, experiment.updates)

    def forward(agent: Agent, observation: jax.Array):
        """Distribution and values of observations [..., *shape]."""
        return network.bind(agent.params)(normalize.normalize(agent.moments, observation))

    def init(key: jax.Array) -> State:
        key, key_params, key_reset = jax.random.split(key, 3)
        params = network.init(key_params)
        stream = stepping.start(env, key_reset, options.environments)
        agent = Agent(params, normalize.no_moments(env.observation_shape))
        scale = normalize.no_reward_scale(options.environments)
        return State(agent, Training(optimizer.init(params), stream, scale, key))

    def act(agent: Agent, observation: jax.Array, key: jax.Array, greedy: bool) -> jax.Array:
        policy, _ = forward(agent, observation)
        return policy.mode() if greedy else policy.sample(key)

    def collect(agent: Agent, training: Training) -> tuple[Training, Steps, dict[str, jax.Array]]:
        """`rollout` steps in each environment."""

        def step(stream: Stream, key):
            key_act, key_step = jax.random.split(key)
            policy, value = forward(agent, stream.observation)
            action = policy.sample(key_act)
            stream, seen, truncated, info = stepping.advance(env, stream, key_step, action)
            ended = episode_metrics(seen.terminated | truncated, info)
            return stream, (Steps(seen, truncated, policy.log_prob(action), value), ended)

        key, key_rollout = jax.random.split(training.key)
        keys = jax.random.split(key_rollout, options.rollout)
        stream, (steps, ended) = jax.lax.scan(step, training.stream, keys)
        return training._replace(stream=stream, key=key), steps, {k: x.sum() for k, x in ended.items()}

    def loss(params: Params, moments: normalize.Moments, batch: Batch):
        policy, value = forward(Agent(params, moments), batch.observation)
        policy_loss, told = ppo_clip_loss(
            policy.log_prob(batch.action), batch.log_prob, normalize_advantages(batch.advantage), options.clip
        )
        values = value_loss(value, batch.target)
        entropy = policy.entropy().mean()
        total = policy_loss + options.value_weight * values - options.entropy_weight * entropy
        told |= {"loss": total, "policy_loss": policy_loss, "value_loss": values, "entropy": entropy}
        return total, told

    def learn(agent: Agent, state: optax.OptState, batch: Batch, key: jax.Array):
        """`epochs` times over the batch, shuffled each time."""

        def minibatch(carry, part: Batch):
            params, state = carry
            gradients, told = jax.grad(loss, has_aux=True)(params, agent.moments, part)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), told

        def epoch(carry, key):
            order = jax.random.permutation(key, len(batch.target))
            parts = jax.tree.map(lambda x: x[order].reshape(options.minibatches, -1, *x.shape[1:]), batch)
            return jax.lax.scan(minibatch, carry, stepping.divide(parts, axis=1))

        keys = jax.random.split(key, options.epochs)
        (params, state), told = jax.lax.scan(epoch, (agent.params, state), keys)
        return params, state, jax.tree.map(jnp.mean, told)

    def update(state: State) -> tuple[State, dict[str, jax.Array]]:
        agent, training = state
        training, steps, metrics = collect(agent, training)
        seen, rewards, scale = steps.seen, steps.seen.reward, training.scale
        if experiment.env.normalize_reward:
            done = seen.terminated | steps.truncated
            scale, rewards = normalize.scale_rewards(scale, rewards, done, options.gamma)
        _, next_values = jax.vmap(forward, (None, 0))(agent, seen.next_observation)
        advantages, targets = gae(
            rewards, steps.value, next_values, seen.terminated, steps.truncated,
            options.gamma, options.gae_lambda,
        )  # fmt: skip
        batch = stepping.flat(Batch(seen.observation, seen.action, steps.log_prob, advantages, targets))
        key, key_learn = jax.random.split(training.key)
        params, optimizer_state, told = learn(agent, training.optimizer, batch, key_learn)
        moments = agent.moments
        if experiment.env.normalize_observation:
            moments = normalize.merge(moments, seen.observation)
        unexplained = jnp.var(targets - steps.value) / jnp.maximum(jnp.var(targets), 1e-8)
        metrics |= told | {"explained_variance": 1 - unexplained}
        training = training._replace(optimizer=optimizer_state, scale=scale, key=key)
        return State(Agent(params, moments), training), metrics

    return Algorithm(init, update, act, lambda agent, observation: forward(agent, observation)[1])


def make_optimizer(options: PPOConfig, updates: int) -> optax.GradientTransformation:
    steps = updates * options.epochs * options.minibatches
    rate = optax.linear_schedule(options.learning_rate, 0.0, steps)
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adam(rate, eps=1e-5),
    )
