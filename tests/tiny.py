"""What many tests start from: a small corpus that no change of ours changes, a tiny run, token shards, random
weights.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import wsgiref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core.config import parse
from core.module import Params
from llm.config import Experiment
from llm.data.loader import Batch
from llm.data.shards import FORMAT
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


def write_shards(
    folder: Path, shards: list[list[list[int]]], weights: list[list[float]] | None = None
) -> Path:
    """Token shards as `build_shards` lays them out: shards of documents of token ids."""
    entries = []
    for number, documents in enumerate(shards):
        path = folder / f"{number:05d}" / "train"
        path.mkdir(parents=True)
        np.save(path / "tokens.npy", np.array([t for d in documents for t in d], np.uint16))
        np.save(path / "starts.npy", np.cumsum([0, *map(len, documents)], dtype=np.int64))
        np.save(
            path / "weights.npy", np.array(weights[number] if weights else [1.0] * len(documents), np.float32)
        )
        np.save(path / "bytes.npy", np.array([len(document) for document in documents], np.int32))
        tokens = sum(map(len, documents))
        counts = {"documents": len(documents), "tokens": tokens, "bytes": tokens}
        entries.append({"train": counts})
    index = {"format": FORMAT, "vocab_size": 1000, "sources": [folder.name], "shards": entries}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def stream(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Shards of documents whose tokens are 0, 1, 2, ... over all."""
    token = itertools.count()
    return [[[next(token) for _ in range(length)] for length in shard] for shard in lengths]


def same_batch(a: Batch, b: Batch) -> bool:
    """Bitwise."""
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@functools.cache
def random_params(config: ModelConfig, deviation: float) -> Params:
    """Random values, so that biases and norms are neither 0 nor 1 and tokens drawn vary."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if "scale" in str(path[-1]) else 0.0
        return jnp.asarray(rng.normal(mean, deviation, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, blueprint(config).shapes)
