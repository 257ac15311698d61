"""Seconds of training up to the threshold: ours against stable-baselines3 with rl-baselines3-zoo's settings.

    taskset -c 0 python -m benchmarks.rl_threshold [--seeds 3] [--only NAME ...] [--json FILE]

One seed at a time on both sides, in turns, each side in a process of its own; `taskset` gives both one core.
Ours trains as the shipped configuration says, stable-baselines3 as the zoo says (its `hyperparams/`, with
networks of its own: [256, 256] for DQN and [400, 300] for DDPG, where ours are [128, 128]), each at most as
long as its own settings train. After the same number of environment steps on both sides, a twentieth of the
shorter run, 20 greedy episodes are played in fresh environments; the first mean at the threshold counts. The
time of playing isn't counted. Our compilation, without a cache, is told beside; five seeds at once, as the
configurations have them, compile once. Breakout is missing, which the zoo doesn't train.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rl_returns import EVALUATIONS, TARGETS
from benchmarks.worker import Worker, serve, timed
from core.errors import require, run_command

EPISODES = 20
PEER = "stable-baselines3"


class Zoo(NamedTuple):
    """What rl-baselines3-zoo trains an environment with."""

    algorithm: str
    steps: int
    settings: dict[str, Any]
    environments: int = 1
    normalize: bool = False
    noise: tuple[str, float] | None = None  # of DDPG's actions, and its deviation


def _falling(first: float) -> Callable[[float], float]:
    """Linearly to 0: stable-baselines3 gives the share of the run that is left."""
    return lambda left: left * first


WIDE, PAIR = {"net_arch": [256, 256]}, {"net_arch": [400, 300]}
ZOO = {
    "ppo-cartpole": Zoo(
        "PPO", 100_000,
        {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
         "learning_rate": _falling(0.001), "clip_range": _falling(0.2)},
        environments=8,
    ),
    "ppo-acrobot": Zoo(
        "PPO", 1_000_000,
        {"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4, "ent_coef": 0.0},
        environments=16, normalize=True,
    ),
    "ppo-pendulum": Zoo(
        "PPO", 100_000,
        {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0,
         "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4},
        environments=4,
    ),
    "dqn-cartpole": Zoo(
        "DQN", 50_000,
        {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000,
         "gamma": 0.99, "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128,
         "exploration_fraction": 0.16, "exploration_final_eps": 0.04, "policy_kwargs": WIDE},
    ),
    "dqn-mountaincar": Zoo(
        "DQN", 120_000,
        {"learning_rate": 4e-3, "batch_size": 128, "buffer_size": 10_000, "learning_starts": 1000,
         "gamma": 0.98, "target_update_interval": 600, "train_freq": 16, "gradient_steps": 8,
         "exploration_fraction": 0.2, "exploration_final_eps": 0.07, "policy_kwargs": WIDE},
    ),
    "ddpg-pendulum": Zoo(
        "DDPG", 20_000,
        {"gamma": 0.98, "buffer_size": 200_000, "learning_starts": 10_000, "train_freq": 1,
         "gradient_steps": 1, "learning_rate": 1e-3, "policy_kwargs": PAIR},
        noise=("normal", 0.1),
    ),
    "ddpg-mountaincar-continuous": Zoo(
        "DDPG", 300_000,
        {"train_freq": 1, "gradient_steps": 1, "learning_rate": 1e-3, "batch_size": 256,
         "policy_kwargs": PAIR},
        noise=("ornstein-uhlenbeck", 0.5),
    ),
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_threshold", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ZOO, default=[*ZOO], metavar="NAME", help=", ".join(ZOO))
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return serve(functools.partial(start, *args.worker))
    require("bench", "stable_baselines3", "gymnasium", "gymnax", "flashbax", "six")
    results = {}
    for name in args.only:
        results[name] = compare(name, args.seeds)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(name: str, seeds: int) -> dict[str, list[float | None]]:
    """Seconds to the threshold of each side and seed, None where it wasn't reached; printed."""
    uncached = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    workers = {
        side: Worker("benchmarks.rl_threshold", "--worker", side, name, env=uncached)
        for side in ("ours", PEER)
    }
    seconds: dict[str, list[float | None]] = {side: [] for side in workers}
    for seed in range(seeds):
        for side, worker in workers.items():
            seconds[side].append(worker.ask(seed=seed))
    compiling = workers["ours"].facts
    for worker in workers.values():
        worker.close()
    ours, theirs = (_median(seconds[side]) for side in ("ours", PEER))
    told = "; ".join(f"{side} {_each(values)}" for side, values in seconds.items())
    print(f"{name}: {told}", flush=True)
    print(
        f"    {ours:.1f} and {theirs:.1f} s: {theirs / ours:.1f}x; compiled in {compiling:.0f} s, "
        f"with that {theirs / (ours + compiling):.2f}x",
        flush=True,
    )
    return seconds


def _median(values: list[float | None]) -> float:
    """Over seeds; one that didn't get there took longer than any."""
    return statistics.median(float("inf") if value is None else value for value in values)


def _each(values: list[float | None]) -> str:
    return f"({', '.join('never' if value is None else f'{value:.1f}' for value in values)})"


def start(side: str, name: str) -> tuple[float, Callable[..., float | None]]:
    """Seconds of compilation, and what measures a seed."""
    from core.config import load
    from rl.config import Experiment

    (target,) = (target for target in TARGETS if target.config == name)
    made = load(Experiment, f"configs/rl/{name}.yaml", ["train.seeds=1", f"eval.episodes={EPISODES}"])
    every = min(made.train.steps, ZOO[name].steps) // EVALUATIONS
    if side == PEER:
        return 0.0, functools.partial(_train_peer, ZOO[name], made.env.name, target.threshold, every)
    return _ours(made, target.threshold, every)


def _ours(made, threshold: float, every: int) -> tuple[float, Callable[[int], float | None]]:
    from core import devices

    devices.prepare()
    import jax
    import jax.numpy as jnp

    from core.mesh import make_mesh
    from rl import start as starting
    from rl.loop import advance_under, make_programs

    programs = make_programs(made, *starting.build(made), make_mesh(made.mesh))
    updates = -(-every // made.steps_per_update)

    def train(seed: int) -> float | None:
        seeds = jnp.array([seed])
        state, done, seconds = programs.init(seeds), 0, 0.0
        while done < made.updates:
            count = min(updates, made.updates - done)
            began = time.perf_counter()
            state, *_ = jax.block_until_ready(advance(state, count))
            done, seconds = done + count, seconds + time.perf_counter() - began
            if programs.evaluate(state.agent, seeds, done)[0].mean() >= threshold:
                return seconds
        return None

    compiling, advance = timed(lambda: advance_under(programs, programs.init(jnp.array([0]))))
    return compiling, train


def _train_peer(zoo: Zoo, environment: str, threshold: float, every: int, seed: int) -> float | None:
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

    train = make_vec_env(environment, zoo.environments, seed=seed)
    fresh = make_vec_env(environment, 1, seed=seed + 10_000)
    if zoo.normalize:
        train, fresh = VecNormalize(train), VecNormalize(fresh, training=False, norm_reward=False)

    class Watch(BaseCallback):
        """Plays off the clock, when all that was collected is learned, and ends at the threshold."""

        playing, reached, next = 0.0, False, every

        def _on_rollout_start(self) -> None:
            if self.num_timesteps >= self.next:
                self.next += every
                self.play()

        def play(self) -> None:
            if zoo.normalize:
                sync_envs_normalization(train, fresh)
            took, (mean, _) = timed(lambda: evaluate_policy(self.model, fresh, EPISODES))
            self.playing += took
            self.reached = mean >= threshold

        def _on_step(self) -> bool:
            return not self.reached

    settings = dict(zoo.settings)
    if zoo.noise:
        settings["action_noise"] = _noise(*zoo.noise, train.action_space.shape)
    learner = getattr(stable_baselines3, zoo.algorithm)(
        "MlpPolicy", train, seed=seed, device="cpu", **settings
    )
    watch = Watch()
    began = time.perf_counter()
    learner.learn(zoo.steps, callback=watch)
    if not watch.reached:
        watch.play()
    return time.perf_counter() - began - watch.playing if watch.reached else None


def _noise(kind: str, deviation: float, shape: tuple[int, ...]):
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

    of = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}[kind]
    return of(np.zeros(shape), np.full(shape, deviation))


if __name__ == "__main__":
    run_command(main)
