"""Ring attention (Liu et al. 2023, arXiv:2310.01889): a sequence divided over the mesh axis `context`.

Keys and values go round the devices, and each adds what its own queries see of them. Were the sequence cut
in order, the first device would soon have nothing to do and the last would see everything. So it is cut into
twice as many pieces as devices, of which device r of n has two, r and 2n - 1 - r ("zigzag", as in Llama 3's
training, arXiv:2407.21783): whatever keys come by, two products of a piece with a piece are visible.

`to_zigzag` and `from_zigzag` bring arrays into that order and back. The model does so at its ends, so that
nobody else has to know of it; positions and documents' starts stay those of the whole sequence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core.mesh import spec
from llm.model.blockwise import join_heads, split_heads
from llm.model.masks import Mask

AXIS = "context"
QUERIES = 128  # rows in a block of the attention map
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

_ROWS = ("act_batch", "act_seq")
_QUERIES, _KEYS = (*_ROWS, "act_heads", "act_head_dim"), (*_ROWS, "act_kv_heads", "act_head_dim")
_SUMS = ("act_batch", "act_kv_heads", None, "act_seq")


def to_zigzag(x: jax.Array) -> jax.Array:
    """[B, S, ...] from the usual order into one in which each device has its two pieces."""
    return _on_each_device(_into_zigzag, x)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _on_each_device(_out_of_zigzag, x)


def _on_each_device(exchange, x: jax.Array) -> jax.Array:
    places = spec((*_ROWS, *[None] * (x.ndim - 2)))
    return jax.shard_map(exchange, in_specs=places, out_specs=places)(x)


def _routes(n: int) -> list[list[tuple[int, int]]]:
    """(in order, in zigzag): on which devices the pieces 0, 2, 4, ... are, and on which 1, 3, 5, ..."""
    home = lambda piece: min(piece, 2 * n - 1 - piece)  # noqa: E731
    return [[(piece // 2, home(piece)) for piece in range(first, 2 * n, 2)] for first in (0, 1)]


def _into_zigzag(x):
    evens, odds = _routes(jax.lax.axis_size(AXIS))
    even, odd = (jax.lax.ppermute(x, AXIS, r) for x, r in zip(_halves(x), (evens, odds), strict=True))
    return _ordered(even, odd)


def _out_of_zigzag(x):
    evens, odds = ([(to, at) for at, to in route] for route in _routes(jax.lax.axis_size(AXIS)))
    even, odd = _halves(_ordered(*_halves(x)))
    return jnp.concatenate([jax.lax.ppermute(even, AXIS, evens), jax.lax.ppermute(odd, AXIS, odds)], axis=1)


def _ordered(x, y):
    """x then y on the devices of even number, y then x on the others: there piece r is an odd one."""
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, x, y), jnp.where(is_even, y, x)], axis=1)


def _halves(x, axis: int = 1):
    return jnp.split(x, 2, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    starts: Int[Array, "B S"],
    mask: Mask,
) -> Float[Array, "B S H K"]:
    """Attention as `blockwise_attention` has it, of arrays in zigzag order. G divides H.

    `starts` holds where each token's document begins, as an index of the usual order. S must be a multiple of
    twice the size of `context`; batch and heads may be divided too. A mask may have a window.
    """
    return _forward(q, k, v, starts, mask)[0]


def _forward(q, k, v, starts, mask):
    places = [spec(axes) for axes in (_QUERIES, _KEYS, _KEYS, _ROWS)]
    out, log_sums = jax.shard_map(
        lambda *arrays: _local_forward(mask, *arrays),
        in_specs=tuple(places),
        out_specs=(places[0], spec(_SUMS)),
        check_vma=False,  # not differentiated: the backward pass is written below
    )(q, k, v, starts)
    return out, (q, k, v, starts, out, log_sums)


def _backward(mask, residuals, g):
    places = [spec(axes) for axes in (_QUERIES, _KEYS, _KEYS, _ROWS, _QUERIES, _SUMS, _QUERIES)]
    gradients = jax.shard_map(
        lambda *arrays: _local_backward(mask, *arrays),
        in_specs=tuple(places),
        out_specs=tuple(places[:3]),
        check_vma=False,
    )(*residuals, g)
    return *gradients, None


ring_attention.defvjp(_forward, _backward)


class Rows(NamedTuple):
    """A piece of queries [b, g, r, c, K], scaled, and what goes with its rows."""

    q: jax.Array
    starts: jax.Array  # [b, c] where each row's document begins
    first: jax.Array  # place of the first row in the sequence
    g: Any = None  # for the backward pass: the output's gradient [b, g, r, c, K],
    inner: Any = None  # its product with the output [b, g, r, c]
    log_sum: Any = None  # and that of the row's weights [b, g, r, c]

    def block(self, number: jax.Array, size: int) -> Rows:
        def cut(x, axis):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)

        q, g, inner, log_sum = (cut(x, 3) for x in (self.q, self.g, self.inner, self.log_sum))
        return Rows(q, cut(self.starts, 1), self.first + number * size, g, inner, log_sum)


class Keys(NamedTuple):
    """A piece of keys and values [b, g, c, K], and the place of its first in the sequence."""

    k: jax.Array
    v: jax.Array
    first: jax.Array


class Pair(NamedTuple):
    """Two pieces whose product is visible, and whether they are the low ones of their devices."""

    rows: Rows
    keys: Keys
    low_rows: jax.Array | bool
    low_keys: jax.Array | bool


class Partial(NamedTuple):
    """Attention over some of the keys, and the logarithm of its weights' sum before the division by it."""

    out: jax.Array  # [b, g, r, c, K] in float32
    log_sum: jax.Array  # [b, g, r, c]; where no key is visible, `_NOTHING` or about that

    def merged(self, other: Partial, where: jax.Array | bool) -> Partial:
        """Over both's keys; `where` it is False, over `self`'s alone."""
        theirs = jnp.where(where, other.log_sum, _NOTHING)
        log_sum = jnp.logaddexp(self.log_sum, theirs)
        mine, theirs = (jnp.exp(x - log_sum)[..., None] for x in (self.log_sum, theirs))
        return Partial(mine * self.out + theirs * other.out, log_sum)


_NOTHING = -1e30  # finite, so that differences are numbers


def _local_forward(mask, q, k, v, starts):
    low, high = _pieces(_scaled(q, k.shape[2]), starts)
    empty = Partial(jnp.zeros(low.q.shape, jnp.float32), jnp.full(low.q.shape[:-1], _NOTHING))

    def visit(pairs, sums):
        of_low, of_high = sums
        for pair in pairs:
            part = _attend(mask, pair.rows, pair.keys)
            of_low = of_low.merged(part, pair.low_rows)
            of_high = of_high.merged(part, jnp.logical_not(pair.low_rows))
        return of_low, of_high

    of_low, of_high = _go_round(visit, low, high, _by_head(k, v), (empty, empty))
    out = jnp.concatenate([of_low.out, of_high.out], axis=3).astype(q.dtype)
    return join_heads(out), jnp.concatenate([of_low.log_sum, of_high.log_sum], axis=3)


def _local_backward(mask, q, k, v, starts, out, log_sum, g):
    """The gradients of a device's keys follow them, and after the last device are passed on home."""
    groups = k.shape[2]
    # d score = weight * (d weight - <d out, out>): the row sum of the softmax's derivative.
    inner = split_heads((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), groups)
    low, high = _pieces(_scaled(q, groups), starts, split_heads(g, groups), inner[..., 0], log_sum)

    def visit(pairs, sums):
        d_low, d_high, d_keys = sums
        for pair in pairs:
            d_rows, *d_pair = _attend_backward(mask, pair.rows, pair.keys)
            d_low += jnp.where(pair.low_rows, d_rows, 0)
            d_high += jnp.where(pair.low_rows, 0, d_rows)
            d_keys = [d + _on_side(new, pair.low_keys) for d, new in zip(d_keys, d_pair, strict=True)]
        return d_low, d_high, _passed_on(d_keys)

    keys = _by_head(k, v)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (low.q, high.q, keys))
    d_low, d_high, d_keys = _go_round(visit, low, high, keys, zeros)
    dq = join_heads(jnp.concatenate([d_low, d_high], axis=3)) * q.shape[-1] ** -0.5
    dk, dv = (x.transpose(0, 2, 1, 3).astype(k.dtype) for x in d_keys)
    return dq.astype(q.dtype), dk, dv


def _go_round(visit, low: Rows, high: Rows, keys, sums):
    """`sums` after `visit(pairs, sums)` with what of each device's keys is visible, its own first.

    In a loop, for the memory of one hop; the keys of the next are on their way while those at hand are used.
    """

    def go(carry, hop):
        keys, sums = carry
        return (_passed_on(keys), visit(_passing_pairs(hop, low, high, keys), sums)), None

    n = jax.lax.axis_size(AXIS)
    own = visit(_own_pairs(low, high, keys), sums)
    if n == 1:
        return own
    (keys, sums), _ = jax.lax.scan(go, (_passed_on(keys), own), jnp.arange(1, n - 1))
    return visit(_passing_pairs(n - 1, low, high, keys), sums)


def _by_head(k, v):
    """[b, s, g, K] -> [b, g, s, K]."""
    return [x.transpose(0, 2, 1, 3) for x in (k, v)]


def _scaled(q, groups: int):
    return split_heads(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), groups)


def _pieces(q, starts, *more) -> tuple[Rows, Rows]:
    """The device's two pieces of queries [b, g, r, 2c, K]; `more` is what else goes with their rows."""
    # Behind a barrier with the queries: of what depends on places alone, the same in every layer, JAX would
    # form all masks of all hops and blocks before the first layer, and keep them.
    q, starts, r = jax.lax.optimization_barrier((q, starts, jax.lax.axis_index(AXIS)))
    n, length = jax.lax.axis_size(AXIS), q.shape[3] // 2
    halves = [*zip(*(_halves(x, axis=3) for x in (q, *more)), strict=True)]
    places = (r * length, (2 * n - 1 - r) * length)
    low, high = (
        Rows(x[0], begin, place, *x[1:])
        for x, begin, place in zip(halves, _halves(starts), places, strict=True)
    )
    return low, high


def _passed_on(x):
    """x from the device before; in every hop each has what came to the one before it in the last."""
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(at, (at + 1) % n) for at in range(n)])


def _own_pairs(low: Rows, high: Rows, keys) -> list[Pair]:
    """On the diagonal every row sees at least itself; the first half is before the second."""
    n, r = jax.lax.axis_size(AXIS), low.first // low.q.shape[3]
    keys_low, keys_high = _key_pieces(keys, r, n)
    return [
        Pair(low, keys_low, True, True),
        Pair(high, keys_high, False, False),
        Pair(high, keys_low, False, True),
    ]


def _passing_pairs(hop: int | jax.Array, low: Rows, high: Rows, keys) -> list[Pair]:
    """Of the four products with the keys of the device `hop` places before this one, the two not hidden."""
    n, r = jax.lax.axis_size(AXIS), low.first // low.q.shape[3]
    source = (r - hop) % n
    keys_low, keys_high = _key_pieces(keys, source, n)
    # The pieces of a device before this one begin before its own, and those of one after end after them.
    before = source < r
    rows, keys_of_them = (
        jax.tree.map(lambda x, y: jnp.where(before, x, y), *sides)
        for sides in ((low, high), (keys_low, keys_high))
    )
    return [Pair(high, keys_low, False, True), Pair(rows, keys_of_them, before, before)]


def _key_pieces(keys, device, n: int) -> tuple[Keys, Keys]:
    (k_low, k_high), (v_low, v_high) = (_halves(x, axis=2) for x in keys)
    length = k_low.shape[2]
    return Keys(k_low, v_low, device * length), Keys(k_high, v_high, (2 * n - 1 - device) * length)


def _on_side(x, low: jax.Array | bool):
    """x [b, g, c, K] in the low or the high half of [b, g, 2c, K], and zeros in the other."""
    return jnp.concatenate([jnp.where(low, x, 0), jnp.where(low, 0, x)], axis=2)


def _attend(mask: Mask, rows: Rows, keys: Keys) -> Partial:
    def block(number):
        part = rows.block(number, size)
        scores = _scores(mask, part, keys)
        top = jnp.maximum(scores.max(-1), _NOTHING)
        weights = jnp.exp(scores - top[..., None])
        total = jnp.maximum(weights.sum(-1), jnp.finfo(jnp.float32).tiny)
        out = _einsum("bgrij,bgjk->bgrik", weights.astype(keys.v.dtype), keys.v)
        return Partial(out / total[..., None], top + jnp.log(total))

    size, count = _blocks(rows)
    return jax.tree.map(_joined, jax.lax.map(block, jnp.arange(count)))


def _attend_backward(mask: Mask, rows: Rows, keys: Keys) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the scaled queries [b, g, r, c, K], the keys and the values [b, g, c, K], in float32."""

    def block(sums, number):
        part, (dk, dv), dtype = rows.block(number, size), sums, rows.q.dtype
        weights = jnp.exp(_scores(mask, part, keys) - part.log_sum[..., None])
        d_weights = _einsum("bgrik,bgjk->bgrij", part.g, keys.v)
        d_scores = (weights * (d_weights - part.inner[..., None])).astype(dtype)
        dv += _einsum("bgrij,bgrik->bgjk", weights.astype(dtype), part.g)
        dk += _einsum("bgrij,bgrik->bgjk", d_scores, part.q)
        return (dk, dv), _einsum("bgrij,bgjk->bgrik", d_scores, keys.k)

    size, count = _blocks(rows)
    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), jnp.arange(count))
    return _joined(dq), dk, dv


def _scores(mask: Mask, rows: Rows, keys: Keys):
    """[b, g, r, i, j] in float32, those of hidden keys minus infinity."""
    i = rows.first + jnp.arange(rows.q.shape[3])[:, None]
    j = keys.first + jnp.arange(keys.k.shape[2])
    visible = mask.visible(i, j, rows.starts[..., None])[:, None, None]
    return jnp.where(visible, _einsum("bgrik,bgjk->bgrij", rows.q, keys.k), -jnp.inf)


def _blocks(rows: Rows) -> tuple[int, int]:
    """Rows of a block, and how many blocks."""
    length = rows.q.shape[3]
    size = next(size for size in range(min(length, QUERIES), 0, -1) if length % size == 0)
    return size, length // size


def _joined(x):
    """[blocks, b, g, r, size, ...] -> [b, g, r, c, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
