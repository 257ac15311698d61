"""The compiled functions of continuous batching: what `llm.engine` calls between looks at its requests.

A few sizes of each are compiled: rows, slots and padded prompts are powers of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.module import Blueprint, Params
from llm.decode import compile_for, for_decoding
from llm.model.cache import Cache, Ring, in_order, into_ring, resize_ring
from llm.model.config import ModelConfig
from llm.model.layers import product
from llm.model.transformer import Compute, Transformer
from llm.sampling import RowSampling, fold_in, sample_rows

STEPS = 8  # tokens of each row between two looks of the host, at most
TOP = 20  # likeliest tokens that are reported at most


class Rows(NamedTuple):
    """What a step has to know of each row."""

    tokens: Any
    positions: Any
    active: Any
    drawn: Any
    keys: Any  # their data, [B, 2]
    sampling: RowSampling


class Drawn(NamedTuple):
    """Tokens drawn, with a trailing axis for the likeliest in `top_*`."""

    ids: Any
    log_probabilities: Any
    top_ids: Any
    top_log_probabilities: Any


class Programs(NamedTuple):
    """The compiled functions of one model."""

    prepare: Callable[[Params], Params]
    key: Callable[..., jax.Array]
    prefill: Callable[..., tuple[Cache, Drawn, Drawn]]
    align: Callable[..., Any]
    put: Callable[..., Ring]
    resize: Callable[..., Ring]
    step: Callable[..., tuple[Ring, Drawn]]


@functools.cache
def compile_batching(config: ModelConfig, dtype: str = "float32") -> Programs:
    """The jitted functions of a model, made once, so that JAX finds what it has compiled before."""
    compute = Compute(dtype)  # type: ignore[arg-type]
    decoding = Blueprint.of(lambda rngs: for_decoding(Transformer(config, compute, rngs)))

    def key(seed, number, repeat):
        keys = jax.random.key(seed)[None]
        for data in (number, repeat):
            keys = fold_in(keys, data[None])
        return jax.random.key_data(keys)[0]

    def prefill(params, cache, tokens, segments, positions, targets, rows, wants_top, score):
        model = decoding.bind(params)
        output = model(tokens, positions, segments, cache)
        drawn = _draw(model, output.hidden[:, -1:], rows, wants_top)
        scores = Drawn(*[jnp.zeros(0)] * 4)
        if score:
            logits = product("bsd,vd->bsv", output.hidden, model.head_kernel, jnp.float32)[0]
            chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            total = jax.nn.logsumexp(logits, axis=-1)
            scores = Drawn(targets, chosen - total, *_top(logits, total))
        return output.cache, drawn, scores

    def step(params, ring, rows, count, wants_top):
        model = decoding.bind(params)

        def body(carry):
            i, ring, rows, out = carry
            output = model(rows.tokens[:, None], rows.positions[:, None], None, ring)
            new = _draw(model, output.hidden, rows, wants_top)
            rows = rows._replace(
                tokens=jnp.where(rows.active, new.ids, 0),
                positions=rows.positions + rows.active,
                drawn=rows.drawn + rows.active,
            )
            return i + 1, output.cache, rows, jax.tree.map(lambda all, one: all.at[i].set(one), out, new)

        batch, top = len(rows.tokens), min(TOP, config.vocab_size)
        shapes = [(STEPS, batch)] * 2 + [(STEPS, batch, top)] * 2
        out = Drawn(*[jnp.zeros(s, t) for s, t in zip(shapes, [jnp.int32, jnp.float32] * 2, strict=True)])
        _, ring, _, out = jax.lax.while_loop(lambda c: c[0] < count, body, (jnp.int32(0), ring, rows, out))
        return ring, out

    def resize(ring, rows, slots):
        return resize_ring(ring, config.num_kv_heads, rows, slots)

    return Programs(
        compile_for(config, dtype).prepare,
        jax.jit(key),
        jax.jit(prefill, donate_argnums=1, static_argnames="score"),
        jax.jit(in_order, static_argnums=2),
        jax.jit(into_ring, donate_argnums=0),
        jax.jit(resize, static_argnums=2),
        jax.jit(step, donate_argnums=1),
    )


def _draw(model: Transformer, hidden, rows: Rows, wants_top) -> Drawn:
    """The next token of each row, from its last hidden state."""
    logits = product("bsd,vd->bsv", hidden, model.head_kernel, jnp.float32, weight_first=True)[:, 0]
    keys = fold_in(jax.random.wrap_key_data(rows.keys), rows.drawn)
    ids, log_probabilities = sample_rows(logits, keys, rows.sampling)
    shape = (len(logits), min(TOP, logits.shape[1]))
    none = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape))  # noqa: E731
    some = lambda: _top(logits, jax.nn.logsumexp(logits, axis=-1))  # noqa: E731
    return Drawn(ids, log_probabilities, *jax.lax.cond(wants_top, some, none))


def _top(logits, total):
    values, ids = jax.lax.top_k(logits, min(TOP, logits.shape[1]))
    return ids, values - total[:, None]
