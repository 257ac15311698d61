"""Seconds of training up to the threshold: ours against stable-baselines3 with rl-baselines3-zoo's settings.

    python -m benchmarks.rl_threshold [--seeds 3] [--only NAME ...] [--json FILE]

One seed at a time on both sides, in turns, each side in a process of its own. Ours trains as the shipped
configuration says, stable-baselines3 as the zoo says (its `hyperparams/`), each at most as long as its own
settings train. After each twentieth of that, 20 greedy episodes are played in fresh environments; the first
mean at the threshold counts. Their own time isn't counted, nor is our compilation, which is told beside. To
train five seeds takes ours hardly longer than one: docs/rl.md has that.
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


WIDE, PAIR = {"net_arch": [256, 256]}, {"net_arch": [400, 300]}
ZOO = {
    "ppo-cartpole": Zoo(
        "PPO", 100_000,
        {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
         "learning_rate": ("linear", 0.001), "clip_range": ("linear", 0.2)},
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_threshold", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ZOO, default=[*ZOO], metavar="NAME", help=", ".join(ZOO))
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(functools.partial(start, *args.worker))
    results = {}
    for name in args.only:
        results[name] = compare(name, args.seeds)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(name: str, seeds: int) -> dict[str, list[float | None]]:
    """Seconds to the threshold of each side and seed, None where it wasn't reached; printed."""
    workers = {side: Worker("benchmarks.rl_threshold", "--worker", side, name) for side in ("ours", PEER)}
    seconds: dict[str, list[float | None]] = {side: [] for side in workers}
    for seed in range(seeds):
        for side, worker in workers.items():
            seconds[side].append(worker.ask(seed=seed))
    compiled = workers["ours"].facts
    for worker in workers.values():
        worker.close()
    middles = {side: _median(values) for side, values in seconds.items()}
    ratio = middles[PEER] / middles["ours"] if middles["ours"] else float("nan")
    told = "   ".join(f"{side} {middles[side]:.1f} s {_each(seconds[side])}" for side in seconds)
    print(f"{name}: {told}   ratio {ratio:.1f}   compiled in {compiled:.0f} s", flush=True)
    return seconds


def _median(values: list[float | None]) -> float:
    """Over seeds; one that didn't get there took longer than any."""
    return statistics.median(float("inf") if value is None else value for value in values)


def _each(values: list[float | None]) -> str:
    return f"({', '.join('never' if value is None else f'{value:.1f}' for value in values)})"


def start(side: str, name: str) -> tuple[float, Callable[..., float | None]]:
    """Seconds of compilation, and what measures a seed."""
    (target,) = (target for target in TARGETS if target.config == name)
    if side == PEER:
        return 0.0, functools.partial(_train_peer, ZOO[name], _environment(name), target.threshold)
    return _ours(name, target.threshold)


def _environment(name: str) -> str:
    from core.config import load
    from rl.config import Experiment

    return load(Experiment, f"configs/rl/{name}.yaml").env.name


def _ours(name: str, threshold: float) -> tuple[float, Callable[[int], float | None]]:
    from core import devices

    devices.prepare()
    import jax
    import jax.numpy as jnp

    from core.config import load
    from core.mesh import make_mesh
    from rl import start as starting
    from rl.config import Experiment
    from rl.loop import advance_under, make_programs

    made = load(Experiment, f"configs/rl/{name}.yaml", ["train.seeds=1", f"eval.episodes={EPISODES}"])
    programs = make_programs(made, *starting.build(made), make_mesh(made.mesh))

    def train(seed: int) -> float | None:
        seeds = jnp.array([seed])
        state, done, seconds = programs.init(seeds), 0, 0.0
        while done < made.updates:
            count = min(-(-made.updates // EVALUATIONS), made.updates - done)
            took, (state, *_) = timed(
                lambda state=state, count=count: jax.block_until_ready(advance(state, count))
            )
            done, seconds = done + count, seconds + took
            if programs.evaluate(state.agent, seeds, done)[0].mean() >= threshold:
                return seconds
        return None

    compiling, advance = timed(lambda: advance_under(programs, programs.init(jnp.array([0]))))
    return compiling, train


def _train_peer(zoo: Zoo, environment: str, threshold: float, seed: int) -> float | None:
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

    torch.set_num_threads(1)  # of networks so small more threads make it slower
    train, fresh = (
        make_vec_env(environment, n, seed=seed + s) for n, s in ((zoo.environments, 0), (1, 10_000))
    )
    if zoo.normalize:
        train, fresh = VecNormalize(train), VecNormalize(fresh, training=False, norm_reward=False)

    class Watch(BaseCallback):
        """Plays now and then, off the clock, and stops at the threshold."""

        playing, reached, next = 0.0, False, zoo.steps / EVALUATIONS

        def _on_step(self) -> bool:
            if self.num_timesteps < self.next:
                return True
            self.next += zoo.steps / EVALUATIONS
            if zoo.normalize:
                sync_envs_normalization(train, fresh)
            took, (mean, _) = timed(lambda: evaluate_policy(self.model, fresh, EPISODES))
            self.playing += took
            self.reached = mean >= threshold
            return not self.reached

    settings = {key: _schedule(value) for key, value in zoo.settings.items()}
    if zoo.noise:
        settings["action_noise"] = _noise(*zoo.noise, train.action_space.shape)
    learner = getattr(stable_baselines3, zoo.algorithm)(
        "MlpPolicy", train, seed=seed, device="cpu", **settings
    )
    watch = Watch()
    began = time.perf_counter()
    learner.learn(zoo.steps, callback=watch)
    return time.perf_counter() - began - watch.playing if watch.reached else None


def _schedule(value: Any) -> Any:
    """A value as stable-baselines3 takes it: what falls linearly to 0 is a function of what is left."""
    if isinstance(value, tuple):
        _, first = value
        return lambda left: left * first
    return value


def _noise(kind: str, deviation: float, shape: tuple[int, ...]):
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

    of = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}[kind]
    return of(np.zeros(shape), np.full(shape, deviation))


if __name__ == "__main__":
    main()
