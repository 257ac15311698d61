"""Contrastive losses of a batch of images and captions, over the global batch and its devices.

With unit vectors u of N images and v of their captions, s the logit scale (a factor) and b a bias:

    softmax   1/2N sum_i [log sum_j exp(s u_i v_j) + log sum_j exp(s u_j v_i) - 2 s u_i v_i]
    sigmoid   1/N  sum_ij log(1 + exp(-z_ij (s u_i v_j + b))),  z_ii = 1, all others -1

the first of CLIP (Radford et al. 2021, arXiv:2103.00020), which goes back to InfoNCE (van den Oord et al.
2018, arXiv:1807.03748); the second of SigLIP (Zhai et al. 2023, arXiv:2303.15343), divided by the batch, not
by its pairs. The batch is divided over n devices, each with B = N/n rows of both. Where the others come from:

| negatives | a device holds, beside its own rows       | its products' size, softmax | sigmoid |
| --------- | ----------------------------------------- | --------------------------- | ------- |
| `dense`   | all vectors, N x N similarities           | 3 N^2                       | 3 N^2   |
| `local`   | all vectors, 2 B x N similarities (or 1)  | 6 B N                       | 3 B N   |
| `chunked` | B passing captions, B x chunk of them     | 4 B N                       | 3 B N   |

In `chunked` the captions go round the devices as keys do in ring attention (Liu et al. 2023,
arXiv:2310.01889); with them go the sums over their columns and their gradients, which so come home. No device
ever has all vectors, and what it holds grows with B alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from core.mesh import mesh_axes, spec

Negatives = Literal["dense", "local", "chunked"]

_ROWS, _SUM = spec(("act_batch",)), PartitionSpec()
_NOTHING = -1e30  # the logit of a column that pads: finite, so that the column's sum is a number
# A logit is up to a hundred cosines: with the short floats that GPUs multiply by default it would be 0.1 off.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Contrast(NamedTuple):
    """The loss, and the share of images whose caption (or its equal) scores highest in the batch."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]  # without a gradient


def softmax_loss(
    image: Float[Array, "N E"],
    text: Float[Array, "N E"],
    scale: Float[Array, ""] | float,
    *,
    negatives: Negatives = "local",
    chunk: int = 1024,
) -> Contrast:
    """How hard it is to tell which caption an image has, and which image a caption, in nats.

    Rows are of unit length. Differentiable in `image`, `text` and `scale`, which is the factor, not its
    logarithm. On a mesh N must divide over `act_batch`. `chunk` is how many columns of similarities `chunked`
    has at one time.
    """
    arrays = _float32(image, text, scale)
    if negatives == "chunked":
        return _softmax_chunked(chunk, *arrays)
    function = functools.partial(_softmax_whole, negatives)
    return _on_each_device(function, (_ROWS, _ROWS, _SUM), _SUM, *arrays)


def sigmoid_loss(
    image: Float[Array, "N E"],
    text: Float[Array, "N E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    negatives: Negatives = "local",
    chunk: int = 1024,
) -> Contrast:
    """How hard it is to tell of every pair whether it is one, in nats an image.

    Arguments as of `softmax_loss`; differentiable in `bias` as well.
    """
    arrays = _float32(image, text, scale, bias)
    if negatives == "chunked":
        return _sigmoid_chunked(chunk, *arrays)
    function = functools.partial(_sigmoid_whole, negatives)
    return _on_each_device(function, (_ROWS, _ROWS, _SUM, _SUM), _SUM, *arrays)


def _float32(*arrays) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _on_each_device(function, inputs, outputs, *arrays, check_vma: bool = True):
    """`function(axes, *arrays)` of what each device has; `axes` are those that divide the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return function((), *arrays)
    return jax.shard_map(
        functools.partial(function, mesh_axes("act_batch")),
        in_specs=inputs, out_specs=outputs, check_vma=check_vma,
    )(*arrays)  # fmt: skip


# Whole rows of similarities; JAX's derivative, which through `all_gather` adds up what all devices found.


def _softmax_whole(negatives: Negatives, axes, image, text, scale) -> Contrast:
    if negatives == "dense":
        image, text = _gathered(axes, image), _gathered(axes, text)
        to_text = scale * _einsum("ie,je->ij", image, text)
        sides, hit = (to_text, to_text.T), _own(to_text, 0)
    else:
        to_text = scale * _einsum("ie,je->ij", image, _gathered(axes, text))
        to_image = scale * _einsum("ie,je->ij", text, _gathered(axes, image))
        sides, hit = (to_text, to_image), _own(to_text, _place(axes) * len(image))
    losses = [jax.nn.logsumexp(side, 1) - jnp.where(hit, side, 0).sum(1) for side in sides]
    return _mean(axes, (losses[0] + losses[1]) / 2, to_text, hit)


def _sigmoid_whole(negatives: Negatives, axes, image, text, scale, bias) -> Contrast:
    first = _place(axes) * len(image)
    if negatives == "dense":
        image, first = _gathered(axes, image), 0
    cosines = _einsum("ie,je->ij", image, _gathered(axes, text))
    logits, hit = scale * cosines + bias, _own(cosines, first)
    return _mean(axes, jax.nn.softplus(jnp.where(hit, -logits, logits)).sum(1), cosines, hit)


def _gathered(axes, x):
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _place(axes) -> int | jax.Array:
    return jax.lax.axis_index(axes) if axes else 0


def _own(similarities, first):
    """Where row i's own column is, `first + i`."""
    return (first + jnp.arange(len(similarities)))[:, None] == jnp.arange(similarities.shape[1])


def _mean(axes, losses, to_text, hit) -> Contrast:
    """Over the rows of all devices."""
    to_text = jax.lax.stop_gradient(to_text)
    accuracy = jnp.mean(jnp.where(hit, to_text, -jnp.inf).max(1) >= to_text.max(1))
    return Contrast(*jax.lax.pmean((losses.mean(), accuracy), axes))


# A chunk of columns at a time, formed again for the backward pass; the gradients are written out.


class _Rows(NamedTuple):
    """Of each of a device's images, over the captions that came by."""

    log_sum: Any  # logarithm of the sum of exponentials
    top: Any  # the greatest logit (or cosine)
    own: Any  # its own caption's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_chunked(chunk, image, text, scale):
    return _softmax_forward(chunk, image, text, scale)[0]


def _softmax_forward(chunk, image, text, scale):
    out, *log_sums = _on_each_device(
        functools.partial(_softmax_sums, chunk),
        (_ROWS, _ROWS, _SUM), (_SUM, _ROWS, _ROWS), image, text, scale, check_vma=False,
    )  # fmt: skip
    return out, (image, text, scale, *log_sums)


def _softmax_backward(chunk, residuals, cotangents):
    return _on_each_device(
        functools.partial(_softmax_gradients, chunk),
        (_ROWS, _ROWS, _SUM, _ROWS, _ROWS, _SUM), (_ROWS, _ROWS, _SUM),
        *residuals, cotangents.loss, check_vma=False,
    )  # fmt: skip


_softmax_chunked.defvjp(_softmax_forward, _softmax_backward)


def _softmax_sums(chunk, axes, image, text, scale):
    def tile(hit, padding, rows, columns, text):
        logits = scale * _einsum("ie,je->ij", image, text)
        seen = jnp.where(padding, _NOTHING, logits)
        rows = _Rows(
            jnp.logaddexp(rows.log_sum, jax.nn.logsumexp(seen, 1)),
            jnp.maximum(rows.top, seen.max(1)),
            rows.own + jnp.where(hit, logits, 0).sum(1),
        )
        return rows, jnp.logaddexp(columns, jax.nn.logsumexp(logits, 0))

    nothing = jnp.full(len(image), -jnp.inf)
    rows, columns = _go_round(
        axes, chunk, tile, _Rows(nothing, nothing, jnp.zeros(len(image))), nothing, text
    )
    losses = (rows.log_sum + columns) / 2 - rows.own
    return _mean_of_rows(axes, losses.mean(), rows), rows.log_sum, columns


def _softmax_gradients(chunk, axes, image, text, scale, row_sums, column_sums, g):
    g = g / (2 * len(image) * _devices(axes))

    def tile(hit, padding, sums, d_text, text, column_sums):
        d_image, d_scale = sums
        cosines = _einsum("ie,je->ij", image, text)
        logits = jnp.where(padding, _NOTHING, scale * cosines)
        d_logits = g * (jnp.exp(logits - row_sums[:, None]) + jnp.exp(logits - column_sums) - 2 * hit)
        d_image += _einsum("ij,je->ie", d_logits, text)
        d_text += _einsum("ij,ie->je", d_logits, image)
        return (d_image, d_scale + jnp.sum(d_logits * cosines)), d_text

    zeros = (jnp.zeros_like(image), jnp.float32(0))
    (d_image, d_scale), d_text = _go_round(axes, chunk, tile, zeros, jnp.zeros_like(text), text, column_sums)
    return scale * d_image, scale * d_text, jax.lax.psum(d_scale, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid_chunked(chunk, image, text, scale, bias):
    return _sigmoid_forward(chunk, image, text, scale, bias, differentiate=False)[0]


def _sigmoid_forward(chunk, image, text, scale, bias, differentiate=True):
    """Each term of this loss is its own, so its gradient can be formed at once."""
    return _on_each_device(
        functools.partial(_sigmoid_sums, chunk, differentiate),
        (_ROWS, _ROWS, _SUM, _SUM), (_SUM, (_ROWS, _ROWS, _SUM, _SUM) if differentiate else None),
        image, text, scale, bias, check_vma=False,
    )  # fmt: skip


def _sigmoid_backward(chunk, gradients, cotangents):
    return tuple(cotangents.loss * gradient for gradient in gradients)


_sigmoid_chunked.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_sums(chunk, differentiate, axes, image, text, scale, bias):
    batch = len(image) * _devices(axes)

    def tile(hit, padding, sums, d_text, text):
        total, rows, gradients = sums
        cosines = _einsum("ie,je->ij", image, text)
        logits = jnp.where(padding, _NOTHING, scale * cosines + bias)
        total += jax.nn.softplus(jnp.where(hit, -logits, logits)).sum()
        # Of cosines: with a bias, what is rounded may differ between a row's maximum and its own element.
        seen = jnp.where(padding, _NOTHING, cosines).max(1)
        rows = _Rows(None, jnp.maximum(rows.top, seen), rows.own + jnp.where(hit, cosines, 0).sum(1))
        if differentiate:
            d_image, d_scale, d_bias = gradients
            d_logits = (jax.nn.sigmoid(logits) - hit) / batch
            d_image += _einsum("ij,je->ie", d_logits, text)
            d_text += _einsum("ij,ie->je", d_logits, image)
            gradients = d_image, d_scale + jnp.sum(d_logits * cosines), d_bias + d_logits.sum()
        return (total, rows, gradients), d_text

    rows = _Rows(None, jnp.full(len(image), -jnp.inf), jnp.zeros(len(image)))
    zeros = (jnp.zeros_like(image), jnp.float32(0), jnp.float32(0)) if differentiate else None
    d_text = jnp.zeros_like(text) if differentiate else None
    (total, rows, gradients), d_text = _go_round(
        axes, chunk, tile, (jnp.float32(0), rows, zeros), d_text, text
    )
    out = _mean_of_rows(axes, total / len(image), rows)
    if not differentiate:
        return out, None
    d_image, *d_rest = gradients
    return out, (scale * d_image, scale * d_text, *jax.lax.psum(d_rest, axes))


def _mean_of_rows(axes, loss, rows: _Rows) -> Contrast:
    return Contrast(*jax.lax.pmean((loss, jnp.mean(rows.own >= rows.top)), axes))


def _go_round(axes, chunk: int, tile, mine, passing, *captions):
    """`mine` and `passing` after a device's images met all captions, chunk by chunk.

    `tile(hit, padding, mine, passing, *captions)` does so for a chunk: `passing` [chunk, ...] are sums that
    belong to its captions and go round with them, `hit` is where an image meets its own, `padding` [chunk] is
    true of columns that fill up the last chunk. After n hops what went round is home.
    """
    rows = len(captions[0])
    passing, captions = (jax.tree.map(lambda x: _cut(chunk, x), x) for x in (passing, captions))
    pieces, width = captions[0].shape[:2]

    def go(carry, hop):
        def meet(mine, piece):
            number, passing, captions = piece
            column = number * width + jnp.arange(width)
            hit = (hop == 0) & (jnp.arange(rows)[:, None] == column)
            return tile(hit, column >= rows, mine, passing, *captions)

        mine, passing, captions = carry
        mine, passing = jax.lax.scan(meet, mine, (jnp.arange(pieces), passing, captions))
        # The captions of the next hop depend on none of this one's sums: they are on their way meanwhile.
        return (mine, _passed_on(axes, passing), _passed_on(axes, captions)), None

    (mine, passing, _), _ = jax.lax.scan(go, (mine, passing, captions), jnp.arange(_devices(axes)))
    return mine, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], passing)


def _cut(chunk: int, x):
    """[B, ...] -> [pieces, width, ...], of equal width, at most `chunk`, padded with zeros."""
    pieces = math.ceil(len(x) / chunk)
    width = math.ceil(len(x) / pieces)
    x = jnp.pad(x, ((0, pieces * width - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(pieces, width, *x.shape[1:])


def _devices(axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _passed_on(axes, x):
    """x of the device before, in the order of `axes`."""
    n = _devices(axes)
    return jax.lax.ppermute(x, axes, [(at, (at + 1) % n) for at in range(n)]) if n > 1 else x
