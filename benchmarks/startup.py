"""How long the commands take to answer, and training to its first step.

    python -m benchmarks.startup [--config configs/llm/quickstart.yaml] [--rounds 3]

The first run makes tokenizer and shards, which are then kept; the rounds after it start from them, once
with an empty compilation cache and once with the one that start has filled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = ("llm.train", "llm.generate", "llm.tokenizer")


def seconds_to_answer(module: str) -> float:
    """Wall-clock seconds of `--help`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_to_first_step(config: str, folder: Path, name: str, cache: Path) -> float:
    """Wall-clock seconds from the command to the first line in `metrics.jsonl`."""
    settings = {
        "run.dir": folder, "run.name": name, "train.steps": 2, "eval.every": 0, "eval.prompts": "[]",
        "optimizer.warmup_steps": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "llm.train", "--config", config]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    metrics, start = folder / name / "metrics.jsonl", time.perf_counter()
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/llm/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = seconds_to_first_step(args.config, folder, "first", folder / "jax-first")
        times: dict[str, list[float]] = {}
        for i in range(args.rounds):
            cache = folder / f"jax-{i}"
            for module in COMMANDS:
                times.setdefault(f"python -m {module} --help", []).append(seconds_to_answer(module))
            for label in ("cold", "warm"):
                seconds = seconds_to_first_step(args.config, folder, f"{label}-{i}", cache)
                times.setdefault(f"first step, {label} compilation cache", []).append(seconds)
    print("| | seconds, median | least | most |\n| --- | --- | --- | --- |")
    print(f"| first step, with tokenizer and shards to make | {first:.1f} | | |")
    for label, values in times.items():
        print(f"| {label} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
