"""Loss on held-out text, in nats per token and in bits per byte, which no tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from core.mesh import local_rows, shardings
from core.module import Blueprint, Params
from llm.config import Experiment
from llm.data.loader import Batch, TokenDataset, across_documents, heldout_batches
from llm.model.loss import cross_entropy
from llm.step import BATCH_AXES, put_batch

FINAL_TOKENS = 4 << 20  # of the last evaluation, which xz is compared on: a few seconds of its time
Evaluate = Callable[[Params, Iterable[Batch]], dict[str, float]]


def evaluation_batches(
    experiment: Experiment, dataset: TokenDataset, mesh: Mesh | None, *, final: bool
) -> Iterator[Batch]:
    """What a scheduled or the final evaluation sees, as batches that fit wherever a microbatch does.

    That is at most `eval.batches` of them, or at the end `FINAL_TOKENS`, spread evenly over the split. With a
    mesh, this process's rows of each.
    """
    data = experiment.data
    shape = (data.batch_size // experiment.train.accumulation, data.sequence_length)
    limit = experiment.eval.batches
    if final or limit is None:
        limit = max(1, FINAL_TOKENS // math.prod(shape))
    batches = heldout_batches(dataset, shape[0], local_rows(mesh, shape[0]) if mesh else slice(None), limit)
    return batches if data.isolate else map(across_documents, batches)


def make_evaluate(blueprint: Blueprint, chunk: int, token_bytes: np.ndarray, mesh: Mesh) -> Evaluate:
    """`evaluate(params, batches) -> {"heldout_loss", "heldout_bits_per_byte"}`, compiled once.

    `token_bytes` [2, V] is how many bytes of text each token stands for, within a text and, after a token of
    no bytes, where it begins one. What a token of no bytes costs is counted, as a compressor pays for its
    end marks.
    """
    lengths = jnp.asarray(token_bytes, jnp.float32)

    def sums(params: Params, batch: Batch) -> jax.Array:
        model = blueprint.bind(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids).hidden
        counted = (batch.weights > 0).astype(jnp.float32)
        _, parts = cross_entropy(hidden, model.head_kernel, batch.targets, counted, chunk=chunk)
        begins = (lengths[0][batch.tokens] == 0).astype(int)
        return jnp.stack([parts.nll, counted.sum(), (counted * lengths[begins, batch.targets]).sum()])

    where = shardings(mesh, blueprint.axes), shardings(mesh, BATCH_AXES)
    jitted = jax.jit(sums, in_shardings=where, out_shardings=shardings(mesh, ()))

    def evaluate(params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        total = np.zeros(3)
        for batch in batches:
            total += np.asarray(jitted(params, put_batch(batch, mesh)), np.float64)
        nats, tokens, size = total
        return {"heldout_loss": nats / tokens, "heldout_bits_per_byte": nats / math.log(2) / size}

    return evaluate
