"""Decoding with a key-value cache: prompts in, tokens out, some of them at a time.

One compiled program reads the prompts (`prefill`), another draws up to CHUNK tokens for every row
(`continue_`); between chunks the host sees what was drawn. A few sizes are compiled: prompts are padded on
the left to a power of two, and the cache grows by doubling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from core.errors import UserError
from core.mesh import shard
from core.module import Blueprint, Params
from llm.model.cache import Cache, empty_cache, grow
from llm.model.config import ModelConfig
from llm.model.layers import Linear, product
from llm.model.transformer import Compute, Transformer, blueprint
from llm.sampling import Sampling, fold_in, sample

CHUNK = 32  # tokens of each row between two looks of the host
PAD = 0


class Completion(NamedTuple):
    """Tokens drawn for a prompt, the stop token included, and their log-probabilities.

    Those are in nats under the model's own distribution, before temperature and filters.
    """

    token_ids: list[int]
    log_probabilities: list[float]


class State(NamedTuple):
    """Where the decoding of B rows stands. The token drawn last is not in the cache yet."""

    cache: Cache
    tokens: Int[Array, " B"]
    log_probabilities: Float[Array, " B"]
    positions: Int[Array, " B"]  # of `tokens`
    drawn: Int[Array, " B"]
    finished: Bool[Array, " B"]


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    keys: Key[Array, " B"],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
) -> list[Completion]:
    """What `stream` yields, joined."""
    rows = [Completion([], []) for _ in prompts]
    for pieces in stream(config, params, prompts, keys, sampling, max_new_tokens, stop_ids, dtype):
        for row, piece in zip(rows, pieces, strict=True):
            row.token_ids.extend(piece.token_ids)
            row.log_probabilities.extend(piece.log_probabilities)
    return rows


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    keys: Key[Array, " B"],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
) -> Iterator[list[Completion]]:
    """Continue each prompt until it draws a stop token or has `max_new_tokens`; yield as tokens come.

    A prompt with the same key gets the same tokens in any batch, but for ties within rounding. Under
    `jax.set_mesh`, `params` may be sharded; every process then gets all tokens.

    Args:
        config: the model's shape.
        params: its parameters, as training has them.
        prompts: their ids, special ones included; each at least one.
        keys: a random key for each prompt, such as `sampling.prompt_keys` gives.
        sampling: how a token is drawn.
        max_new_tokens: at least 1.
        stop_ids: tokens that end a completion, as its last.
        dtype: of the products.

    Raises:
        UserError: if a prompt is empty, or prompt and completion are longer than `config.max_length`.
    """
    length = _check_lengths(config, prompts, max_new_tokens)
    programs = compile_for(config, dtype)
    params = programs.prepare(params)
    stop = np.asarray([*stop_ids] or [-1], np.int32)
    tokens, segments = left_pad(prompts, length)
    remaining, before = max_new_tokens - 1, np.zeros(len(prompts), np.int32)
    slots = cache_slots(length + min(CHUNK, remaining), length + remaining)
    state = programs.prefill(params, tokens, segments, keys, sampling, stop, slots)
    new: Any = state.tokens[:, None], state.log_probabilities[:, None]
    while True:
        after, finished, ids, log_probabilities = jax.device_get((state.drawn, state.finished, *new))
        yield [
            Completion(ids[i, :count].tolist(), log_probabilities[i, :count].tolist())
            for i, count in enumerate(after - before)
        ]
        if remaining == 0 or finished.all():
            return
        count, before = min(CHUNK, remaining), after
        if length + count > slots:
            slots = cache_slots(length + count, length + remaining)
            state = programs.grow(state, slots)
        state, new = programs.continue_(params, state, keys, sampling, stop, count)
        length, remaining = length + count, remaining - count


def _check_lengths(config: ModelConfig, prompts: Sequence[list[int]], max_new_tokens: int) -> int:
    """The length that prompts are padded to: a power of two, so that few programs are compiled."""
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty: it must have at least one token to go on from")
    if max_new_tokens < 1:
        raise UserError(f"the number of new tokens is {max_new_tokens}: it must be at least 1")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.max_length:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are {longest + max_new_tokens}, "
            f"more than model.max_length ({config.max_length}): shorten the prompt or ask for fewer tokens"
        )
    return power_of_two(max(longest, 16))


def power_of_two(n: int) -> int:
    """The least that is at least `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


def left_pad(
    prompts: Sequence[list[int]], length: int
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    """The prompts, each at the end of its row, and segment ids: 0 for padding, 1 for a token."""
    tokens = np.full((len(prompts), length), PAD, np.int32)
    segments = np.zeros_like(tokens)
    for row, segment, prompt in zip(tokens, segments, prompts, strict=True):
        row[length - len(prompt) :] = prompt
        segment[length - len(prompt) :] = 1
    return tokens, segments


def cache_slots(needed: int, total: int) -> int:
    """A power of two, since every step reads all slots; no more than all tokens will take, to the next 64."""
    return min(power_of_two(max(needed, 64)), -(-total // 64) * 64)


def for_decoding(model: Transformer) -> Transformer:
    """The model with its layers apart and its weights as products with few rows want them.

    Layers are arrays of their own, because a slice out of a stack is a copy of it at every token. Kernels are
    [outputs, inputs], cast to the dtype of the products, and multiplied from the left.
    """
    dtype = model.compute.dtype
    model.blocks = nnx.List(model.layers())
    for linear in [node for _, node in nnx.iter_graph(model) if isinstance(node, Linear)]:
        x, kernel, out = linear.equation.replace("->", ",").split(",")
        order = sorted(range(len(kernel)), key=lambda i: kernel[i] not in out)
        linear.equation = f"{x},{''.join(kernel[i] for i in order)}->{out}"
        linear.kernel = nnx.Param(linear.kernel[...].transpose(order).astype(dtype))
        linear.weight_first = True
    model.embedding = nnx.Param(model.embedding[...].astype(dtype))
    if model.head is not None:
        model.head = nnx.Param(model.head[...].astype(dtype))
    return model


class Programs(NamedTuple):
    """The compiled functions of one model."""

    prepare: Callable[[Params], Params]
    prefill: Callable[..., State]
    continue_: Callable[..., tuple[State, tuple[jax.Array, jax.Array]]]
    grow: Callable[[State, int], State]


@functools.cache
def compile_for(config: ModelConfig, dtype: str = "float32") -> Programs:
    """The jitted functions of a model, made once, so that JAX finds what it has compiled before."""
    compute = Compute(dtype)  # type: ignore[arg-type]
    trained = blueprint(config, compute)
    decoding = Blueprint.of(lambda rngs: for_decoding(Transformer(config, compute, rngs)))

    def prepare(params):
        return nnx.to_pure_dict(nnx.state(for_decoding(trained.bind(params))))

    def prefill(params, tokens, segments, keys, sampling, stop_ids, slots):
        model, batch = decoding.bind(params), len(tokens)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        output = model(tokens, positions, segments, empty_cache(config, batch, slots, dtype))
        zeros = jnp.zeros(batch, jnp.int32)
        state = State(output.cache, zeros, zeros.astype(jnp.float32), positions[:, -1], zeros, zeros > 0)
        return _readable(_draw(model, output.hidden, state, keys, sampling, stop_ids))

    def continue_(params, state, keys, sampling, stop_ids, count):
        model = decoding.bind(params)

        def go_on(carry):
            i, state, _ = carry
            return (i < count) & ~state.finished.all()

        def step(carry):
            i, state, (ids, log_probabilities) = carry
            segments = jnp.ones_like(state.tokens)[:, None]
            output = model(state.tokens[:, None], state.positions[:, None], segments, state.cache)
            state = state._replace(cache=output.cache)
            state = _draw(model, output.hidden, state, keys, sampling, stop_ids)
            new = ids.at[:, i].set(state.tokens), log_probabilities.at[:, i].set(state.log_probabilities)
            return i + 1, state, new

        shape = (len(state.tokens), CHUNK)
        new = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        _, state, new = jax.lax.while_loop(go_on, step, (jnp.int32(0), state, new))
        return _readable(state), jax.tree.map(lambda x: shard(x, None, None), new)

    return Programs(
        jax.jit(prepare),
        jax.jit(prefill, static_argnums=6),
        jax.jit(continue_, donate_argnums=1),
        jax.jit(lambda state, slots: state._replace(cache=grow(state.cache, slots)), static_argnums=1),
    )


def _draw(model: Transformer, hidden, state: State, keys, sampling: Sampling, stop_ids) -> State:
    """The state after a token is drawn for each row that isn't finished, from its last hidden state."""
    logits = product("bsd,vd->bsv", hidden[:, -1:], model.head_kernel, jnp.float32, weight_first=True)
    tokens, log_probabilities = sample(logits[:, 0], fold_in(keys, state.drawn), sampling)
    tokens = shard(jnp.where(state.finished, PAD, tokens), None)
    log_probabilities = shard(jnp.where(state.finished, 0.0, log_probabilities), None)
    drawn = state.drawn + ~state.finished
    finished = state.finished | jnp.isin(tokens, stop_ids)
    return State(state.cache, tokens, log_probabilities, state.positions + 1, drawn, finished)


def _readable(state: State) -> State:
    """With all that a process reads of it on every device."""
    return state._replace(drawn=shard(state.drawn, None), finished=shard(state.finished, None))
