"""What many tests start from: a small corpus that no change of ours changes, a tiny run, random weights."""

from __future__ import annotations

import functools
import shutil
import wsgiref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core.config import parse
from core.module import Params
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint


def copy_corpus(folder: Path) -> Path:
    """Copy a few real text files into `folder`: a package of the standard library."""
    for path in sorted(Path(wsgiref.__file__).parent.glob("*.py")):
        shutil.copy(path, folder)
    return folder


def experiment(corpus: Path, runs: Path, name: str = "run", **changes: dict) -> Experiment:
    """Twelve steps of a tiny model on the files of `corpus`, with sections of the configuration updated."""
    data = {
        "run": {"name": name, "dir": str(runs)},
        "data": {
            "sources": [f"{corpus}/*.py"],
            "sequence_length": 16,
            "batch_size": 8,
            "cache": str(corpus.parent / "cache"),
        },
        "model": {
            "vocab_size": 300,
            "num_layers": 2,
            "embed_dim": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "mlp_dim": 32,
            "max_length": 32,
            "tied_head": True,
        },
        "train": {"steps": 12, "attention": "reference"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "eval": {"every": 6, "batches": 2},
        "checkpoint": {"every": 4},
    }
    for section, values in changes.items():
        data.setdefault(section, {}).update(values)
    return parse(Experiment, data)


@functools.cache
def random_params(config: ModelConfig, deviation: float) -> Params:
    """Random values, so that biases and norms are neither 0 nor 1 and tokens drawn vary."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if "scale" in str(path[-1]) else 0.0
        return jnp.asarray(rng.normal(mean, deviation, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, blueprint(config).shapes)
