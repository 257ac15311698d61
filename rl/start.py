"""From an experiment to its environment and algorithm, and from a run folder to its agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.checkpoint import newest_params
from core.config import load
from core.errors import UserError
from core.kinds import AGENT
from core.run import RunFolder
from rl import ddpg, dqn, ppo, q_learning
from rl.algorithm import Algorithm, State
from rl.config import Experiment
from rl.envs.wrapper import Env, make

MAKE = {"ppo": ppo.make, "dqn": dqn.make, "ddpg": ddpg.make, "q_learning": q_learning.make}


class Trained(NamedTuple):
    """What a run's newest checkpoint acts with."""

    experiment: Experiment
    env: Env
    algorithm: Algorithm
    agents: Any  # each leaf [seeds, ...]


def build(experiment: Experiment) -> tuple[Env, Algorithm]:
    """The environment, and the algorithm on it.

    Raises:
        UserError: for an environment that is not known or that the algorithm can't act in.
    """
    env = make(experiment.env.name)
    if env.states is not None and experiment.algorithm != "q_learning":
        raise UserError(
            f"what {env.name} shows is the number of a state, of which networks make nothing: use q_learning"
        )
    return env, MAKE[experiment.algorithm](experiment, env)


def init(algorithm: Algorithm, seeds: jax.Array) -> State:
    """The states that runs of `seeds` begin with, each leaf [seeds, ...]; traceable."""
    states = jax.vmap(algorithm.init)(jax.vmap(jax.random.key)(seeds))
    # Python's numbers in an environment's state would make the first call's types others than the later.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), states)


def seeds(experiment: Experiment) -> jax.Array:
    """[seeds] the seed of each run."""
    return experiment.seed + jnp.arange(experiment.train.seeds)


def agent_of(trained: Trained, seed: int | None) -> Any:
    """The agent of one seed, by default the first.

    Raises:
        UserError: if the run has no such seed.
    """
    first, count = trained.experiment.seed, trained.experiment.train.seeds
    if seed is not None and not first <= seed < first + count:
        raise UserError(f"--seed {seed}: the run holds the agents of seeds {first} to {first + count - 1}")
    return jax.tree.map(lambda leaf: leaf[0 if seed is None else seed - first], trained.agents)


def load_trained(folder: Path) -> Trained:
    """The agents of a run.

    Raises:
        UserError: where there is no run or no checkpoint, or it doesn't fit.
    """
    run = RunFolder.open(folder, AGENT)
    experiment = load(Experiment, run.config)
    env, algorithm = build(experiment)
    shapes = jax.eval_shape(lambda: init(algorithm, seeds(experiment)))
    return Trained(experiment, env, algorithm, newest_params(run, shapes.agent))
