"""Environment steps a second while PPO trains on CartPole-v1: ours against stable-baselines3 on PyTorch.

    python -m benchmarks.rl [--seconds 10] [--rounds 3] [--growth] [--json FILE]

Same machine, environment and network (two hidden layers of 64, tanh, for policy and value each). Ours runs
configs/rl/ppo-cartpole-wide.yaml and, beside it, the same with as many epochs as stable-baselines3 takes by
default (10). That runs its defaults: 2048 steps in each environment, minibatches of 64, 10 epochs, in 8
environments in one process, which are faster for a pole than processes are. Each variant runs in a process
of its own and they take turns; what counts is the ratio within a round. Compilation isn't counted, and
everything else of training is. `--growth` also tells how ours grows with environments and with seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.worker import Worker, serve
from core.errors import require, run_command

CONFIG = "configs/rl/ppo-cartpole-wide.yaml"
EPOCHS = 10  # stable-baselines3's default
ENVIRONMENTS = 8  # stable-baselines3's, here
VARIANTS = {"ours": (), "ours, 10 epochs": (f"ppo.epochs={EPOCHS}",), "stable-baselines3": None}
GROWTH = {
    "environments": [(f"ppo.environments={n}", "ppo.minibatches=4") for n in (8, 32, 128, 512, 2048)],
    "seeds": [
        (f"train.seeds={n}", "ppo.environments=16", "ppo.minibatches=4", "ppo.epochs=10")
        for n in (1, 2, 4, 8)
    ],
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each turn, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="also with environments and seeds")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return serve(functools.partial(start, json.loads(args.worker)))
    require("bench", "stable_baselines3", "gymnasium", "gymnax", "flashbax", "six")
    results = {"rounds": compare(args.seconds, args.rounds)}
    if args.growth:
        results["growth"] = {axis: grow(options, args.seconds) for axis, options in GROWTH.items()}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(seconds: float, rounds: int) -> dict[str, list[float]]:
    """Steps a second of each variant in each round, printed with the ratios to stable-baselines3's."""
    workers = {name: _worker(overrides) for name, overrides in VARIANTS.items()}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            rates[name].append(worker.ask(seconds=seconds))
    for worker in workers.values():
        worker.close()
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["stable-baselines3"], strict=True))
        print(f"{name:<20} {statistics.median(values):>12,.0f} steps/s  {ratio:>7.1f}x", flush=True)
    return rates


def grow(options: list[tuple[str, ...]], seconds: float) -> dict[str, float]:
    """Steps a second of ours with each of the overrides, printed."""
    rates = {}
    for overrides in options:
        worker = _worker(overrides)
        rates[overrides[0]] = worker.ask(seconds=seconds)
        worker.close()
        print(f"{overrides[0]:<24} {rates[overrides[0]]:>12,.0f} steps/s", flush=True)
    return rates


def _worker(overrides: tuple[str, ...] | None) -> Worker:
    return Worker("benchmarks.rl", "--worker", json.dumps(overrides))


def start(overrides: list[str] | None) -> tuple[None, Callable[..., float]]:
    """What measures one variant for about so many seconds: steps a second, of all seeds together."""
    return None, _stable_baselines3() if overrides is None else _ours(overrides)


def _ours(overrides: list[str]) -> Callable[[float], float]:
    from core import devices

    devices.prepare()
    import jax

    from core.config import load
    from core.mesh import make_mesh
    from rl import start
    from rl.config import Experiment
    from rl.loop import advance_under, make_programs

    made = load(Experiment, CONFIG, [*overrides, "train.steps=1_048_576"])
    programs = make_programs(made, *start.build(made), make_mesh(made.mesh))
    state = programs.init(start.seeds(made))
    advance = advance_under(programs, state)
    state, *_ = jax.block_until_ready(advance(state, 1))

    def measure(seconds: float) -> float:
        nonlocal state
        began, updates = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            state, *_ = jax.block_until_ready(advance(state, 1))
            updates += 1
        each = made.steps_per_update * made.train.seeds
        return updates * each / (time.perf_counter() - began)

    return measure


def _stable_baselines3() -> Callable[[float], float]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Until(BaseCallback):
        """Stops at the end of the rollout in which the time is over, so that whole updates are counted."""

        def __init__(self, at: float):
            super().__init__()
            self.at, self.late = at, False

        def _on_rollout_start(self) -> None:
            self.late = time.perf_counter() > self.at

        def _on_step(self) -> bool:
            return not self.late

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", ENVIRONMENTS), n_epochs=EPOCHS, device="cpu")

    def measure(seconds: float) -> float:
        began = time.perf_counter()
        model.learn(10**9, callback=Until(began + seconds))
        return model.num_timesteps / (time.perf_counter() - began)

    return measure


if __name__ == "__main__":
    run_command(main)
