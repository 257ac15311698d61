"""What a step of pretraining minimizes, its gradient, and the step (`core.state`) compiled for a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from core.mesh import put_rows, shard
from core.module import Blueprint, Params
from core.optim import Optimizer
from core.state import jit_step, make_step, state_shardings
from llm.config import TrainConfig
from llm.data.loader import Batch
from llm.model.loss import cross_entropy

BATCH_AXES = ("act_batch", "act_seq")


def objective(
    blueprint: Blueprint, train: TrainConfig, params: Params, batch: Batch, share: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What training minimizes: a sum over weighted tokens, and of the router's losses, which are means over
    all tokens of a microbatch, a `share` of each. And its parts: `loss`, the negative log-likelihood alone in
    nats, and in a model with experts what `Routing` holds.
    """
    model = blueprint.bind(params)
    output = model(batch.tokens, batch.positions, batch.segment_ids)
    total, sums = cross_entropy(
        output.hidden,
        model.head_kernel,
        batch.targets,
        batch.weights,
        z_loss=train.z_loss,
        chunk=train.loss_chunk,
    )
    parts, moe = {"loss": sums.nll}, model.config.moe
    if moe is not None:
        routing = jax.tree.map(lambda mean: share * mean, output.routing)
        total += moe.balance_loss * routing.balance_loss + moe.router_z_loss * routing.router_z_loss
        parts |= routing._asdict()
    return total, parts


def gradients(
    blueprint: Blueprint,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    scale: Float[Array, ""] | float = 1.0,
) -> tuple[Params, dict[str, Float[Array, ""]]]:
    """Mean gradient over the batch's weighted tokens, and the means of what `objective` is made of.

    Microbatches share one denominator, so that accumulation is exact where their token counts differ. It
    enters with the weights, as does `scale`, a factor on the loss while it is differentiated: so every
    product of the backward pass, the head's included, has operands of the magnitude that float16 needs.
    The router's losses are means of the microbatches' own: experts are balanced within each.
    """
    total = batch.weights.sum()
    total = jnp.where(total > 0, total, 1.0)
    batch = batch._replace(weights=batch.weights * (scale / total))
    share = scale / train.accumulation
    differentiate = jax.grad(functools.partial(objective, blueprint, train), has_aux=True)
    if train.accumulation == 1:
        sums = differentiate(params, batch, share)
    else:
        parts = jax.tree.map(lambda x: _split(x, train.accumulation), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(differentiate, params, first, share))
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, differentiate(params, part, share)), None),
            zeros,
            parts,
        )
    return jax.tree.map(lambda x: x / scale, sums)


def _split(x: jax.Array, count: int) -> jax.Array:
    """[B, S] -> [count, B / count, S]; every microbatch takes rows from each device, so none moves."""
    return shard(jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), None, *BATCH_AXES)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch (NumPy) as global arrays on the mesh, see `core.mesh.put_rows`."""
    return put_rows(batch, mesh, BATCH_AXES)


def jit_train_step(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer, mesh: Mesh):
    """The training step, compiled for the mesh: shardings from the parameters' metadata, state donated."""

    def mean_gradients(params, batch, scale, step):
        return gradients(blueprint, train, params, batch, scale)

    step = make_step(mean_gradients, train, optimizer)
    return jit_step(step, state_shardings(blueprint, train, optimizer, mesh), BATCH_AXES, mesh)
