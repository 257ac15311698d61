"""Runs under test: stopped, killed, started as a user would, and compared bit for bit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import llm.loop
from core.checkpoint import Checkpointer
from core.metrics import read_metrics

ROOT = Path(__file__).parents[1]
TIMES = (
    "tokens_per_second",
    "data_seconds",
    "compute_seconds",
    "checkpoint_seconds",
    "mfu",
    "images_per_second",
    "steps_per_second",
)


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics less the times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run / "metrics.jsonl")]


def stop_at(
    monkeypatch, step: int, act: Callable[[], None], module: ModuleType = llm.loop, name: str = "put_batch"
) -> None:
    """Call `act` when the loop in `module` fetches the batch of `step`, counted from where it begins.

    `name` is what puts batches on the mesh there.
    """
    steps = iter(range(1, 10**6))
    put = getattr(module, name)

    def counting(batch, mesh):
        if next(steps) == step:
            act()
        return put(batch, mesh)

    monkeypatch.setattr(module, name, counting)


def saved(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name, of the newest if none is named; random keys as their numbers."""
    folder, handler = run / "checkpoints", ocp.PyTreeCheckpointHandler()
    folder = folder / str(step or Checkpointer(folder).latest_step())
    arrays: dict[str, np.ndarray] = {}
    for item in ("params", "opt"):
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder / item).tree
        )
        tree = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=kinds))
        arrays |= named(tree, item)
    return arrays


def named(tree: Any, item: str) -> dict[str, np.ndarray]:
    """A tree's arrays by path, spelled alike for lists, dictionaries and named tuples, as Orbax makes no
    difference between them where it knows no target.
    """

    def plain(value: Any) -> np.ndarray:
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(value) if is_key else value)

    def spelled(entry: Any) -> str:
        return str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))

    return {
        ".".join([item, *map(spelled, path)]): plain(value) for path, value in jax.tree.leaves_with_path(tree)
    }


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.tobytes() == theirs[name].tobytes(), name


def assert_same_parameters(run: Path, other: Path) -> None:
    ours, theirs = (
        {name: value for name, value in saved(folder).items() if name.startswith("params")}
        for folder in (run, other)
    )
    assert_same_bits(ours, theirs)


def command(config: Path, *arguments: str, module: str = "llm.train") -> list[str]:
    return [sys.executable, "-m", module, "--config", str(config), *arguments]


def clean_environment(cache: Path) -> dict[str, str]:
    """As a user's shell: one CPU device, compiled programs kept in `cache`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    return environment | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
