"""The training step: `step(state, batch) -> (state, metrics)`, pure, jitted once, its state donated."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from core.mesh import shard, shardings
from core.module import Blueprint, Params
from core.optim import Optimizer, clip
from core.optim import state_shardings as optimizer_shardings
from llm.config import TrainConfig
from llm.data.loader import Batch
from llm.model.loss import cross_entropy

BATCH_AXES = ("act_batch", "act_seq")


class State(NamedTuple):
    """All that training changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def loss_sum(
    blueprint: Blueprint, train: TrainConfig, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sum over the batch of the training objective, and of the negative log-likelihood alone, in nats."""
    model = blueprint.bind(params)
    hidden = model(batch.tokens, batch.positions, batch.segment_ids).hidden
    total, sums = cross_entropy(
        hidden, model.head_kernel, batch.targets, batch.weights, z_loss=train.z_loss, chunk=train.loss_chunk
    )
    return total, sums.nll


def gradients(
    blueprint: Blueprint, train: TrainConfig, params: Params, batch: Batch
) -> tuple[Params, Float[Array, ""]]:
    """Mean gradient over the batch's weighted tokens, and the mean negative log-likelihood in nats.

    Microbatches share one denominator, so that accumulation is exact where their token counts differ.
    """
    total = jnp.maximum(batch.weights.sum(), 1.0)

    def of(microbatch: Batch):
        def mean_loss(params):
            objective, nll = loss_sum(blueprint, train, params, microbatch)
            return objective / total, nll / total

        return jax.grad(mean_loss, has_aux=True)(params)

    if train.accumulation == 1:
        return of(batch)
    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    return jax.lax.scan(
        lambda sums, micro: (jax.tree.map(jnp.add, sums, of(micro)), None),
        zeros,
        jax.tree.map(lambda x: _split(x, train.accumulation), batch),
    )[0]


def _split(x: jax.Array, count: int) -> jax.Array:
    """[B, S] -> [count, B / count, S]; every microbatch takes rows from each device, so none moves."""
    return shard(jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), None, *BATCH_AXES)


def local_rows(mesh: Mesh, shape: tuple[int, int]) -> slice:
    """The rows of a global batch of `shape` [B, S] that this process's devices hold."""
    places = shardings(mesh, BATCH_AXES).addressable_devices_indices_map(shape).values()
    spans = [rows.indices(shape[0]) for rows, _ in places]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch (NumPy) as global arrays on the mesh."""
    sharding = shardings(mesh, BATCH_AXES)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def make_train_step(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer):
    """The step as a plain function; `jit_train_step` compiles it for a mesh."""

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, loss = gradients(blueprint, train, state.params, batch)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.transform.update(
            clip(grads, norm, optimizer.clip_norm), state.opt_state, state.params
        )
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": optimizer.learning_rate(state.step)}
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return train_step


def state_shardings(blueprint: Blueprint, optimizer: Optimizer, mesh: Mesh) -> State:
    """Where each array of the state lives."""
    params = shardings(mesh, blueprint.axes)
    opt_state = optimizer_shardings(optimizer, blueprint.shapes, params, mesh)
    return State(shardings(mesh, ()), params, opt_state)


def init_state(blueprint: Blueprint, optimizer: Optimizer, mesh: Mesh, seed: int) -> State:
    """The state before the first step, made in place on the mesh; the same bits on every mesh."""

    def make(key):
        params = blueprint.init(key)
        return State(jnp.int32(0), params, optimizer.transform.init(params))

    return jax.jit(make, out_shardings=state_shardings(blueprint, optimizer, mesh))(jax.random.key(seed))


def jit_train_step(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer, mesh: Mesh):
    """`make_train_step`, compiled for the mesh: shardings from the parameters' metadata, state donated."""
    state = state_shardings(blueprint, optimizer, mesh)
    return jax.jit(
        make_train_step(blueprint, train, optimizer),
        in_shardings=(state, shardings(mesh, BATCH_AXES)),
        out_shardings=(state, shardings(mesh, ())),
        donate_argnums=0,
    )
