"""The gradient of a contrastive training step, and the bound on the logit scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip.config import TrainConfig
from clip.data.batches import Batch
from clip.loss import Contrast, sigmoid_loss, softmax_loss
from clip.model.model import pixels
from core.mesh import shard
from core.module import Blueprint, Params

LARGEST_SCALE = 100.0


def gradients(
    blueprint: Blueprint,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    key: jax.Array,
    scale: Float[Array, ""] | float = 1.0,
) -> tuple[Params, dict[str, Float[Array, ""]]]:
    """Gradient of the loss over the whole batch, and `loss`, `accuracy` and `logit_scale` (the factor).

    With `train.accumulation` microbatches every image still meets the captions of all: their vectors are
    formed first, keeping nothing, the loss is differentiated at the vectors, and each microbatch is
    encoded once more to carry its share of that gradient to the parameters (GradCache, Gao et al. 2021,
    arXiv:2101.06983). Both times `key` draws the same patches to drop.

    `scale` is a factor on the loss while it is differentiated.
    """
    encode = functools.partial(_encode, blueprint)

    def loss(params, image, text):
        contrast = _contrast(train, blueprint.bind(params), image, text)
        return scale * contrast.loss, contrast

    if train.accumulation == 1:
        through = lambda params: loss(params, *encode(params, (batch, key)))  # noqa: E731
        sums, contrast = jax.grad(through, has_aux=True)(params)
    else:
        count = train.accumulation
        parts = jax.tree.map(lambda x: _split(x, count), batch), jax.random.split(key, count)
        vectors = jax.lax.map(functools.partial(encode, params), parts)
        whole = jax.tree.map(_joined, vectors)
        (first, *at_vectors), contrast = jax.grad(loss, (0, 1, 2), has_aux=True)(params, *whole)

        def carry_on(sums, piece):
            part, gradient = piece
            _, backward = jax.vjp(lambda params: encode(params, part), params)
            return jax.tree.map(jnp.add, sums, *backward(gradient)), None

        at_vectors = tuple(_split(x, count) for x in at_vectors)
        sums, _ = jax.lax.scan(carry_on, first, (parts, at_vectors))
    metrics = contrast._asdict() | {"logit_scale": jnp.exp(params["logit_scale"])}
    return jax.tree.map(lambda x: x / scale, sums), metrics


def clamp(params: Params) -> Params:
    """The parameters after an optimizer's step, a logit scale that left [1, 100] put back on the bound.

    The parameter is its logarithm, so in [0, ln 100] (Radford et al. 2021, section 2.5). That of the sigmoid
    loss, which has a bias too, is free, as in SigLIP.
    """
    if "logit_bias" in params:
        return params
    bounded = jnp.clip(params["logit_scale"], 0.0, math.log(LARGEST_SCALE))
    return params | {"logit_scale": bounded}


def _encode(blueprint: Blueprint, params: Params, piece: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
    """Unit vectors [B, E] of images and captions."""
    batch, key = piece
    model = blueprint.bind(params)
    images = pixels(batch.images, model.config.image)
    return model.encode_image(images, key=key), model.encode_text(batch.tokens, batch.ends)


def _contrast(train: TrainConfig, model: Any, image: jax.Array, text: jax.Array) -> Contrast:
    factor = jnp.exp(model.logit_scale[...])
    if train.loss == "sigmoid":
        loss: Callable[..., Contrast] = functools.partial(sigmoid_loss, bias=model.logit_bias[...])
    else:
        loss = softmax_loss
    return loss(image, text, factor, negatives=train.negatives, chunk=train.chunk)


def _split(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]; every microbatch takes rows from each device, so none moves."""
    parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return shard(parts, None, "act_batch", *[None] * (x.ndim - 1))


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    rows = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return shard(rows, "act_batch", *[None] * (rows.ndim - 1))
