"""The training step: `step(state, batch) -> (state, metrics)`, pure, jitted once, its state donated."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from core.loss_scale import LossScale, where_finite
from core.mesh import mesh_parts, shard, shardings
from core.module import Blueprint, Params
from core.optim import Optimizer, clip, fetched, put_back
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
    scale: LossScale | None = None  # in float16
    average: Params | None = None  # of the parameters over past steps, where `train.average` asks for it

    @property
    def model(self) -> Params:
        """The parameters that are evaluated, and that others read from a checkpoint."""
        return self.params if self.average is None else self.average


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


def local_rows(mesh: Mesh, shape: tuple[int, int]) -> slice:
    """The rows of a global batch of `shape` [B, S] that this process's devices hold."""
    places = shardings(mesh, BATCH_AXES).addressable_devices_indices_map(shape).values()
    spans = [rows.indices(shape[0]) for rows, _ in places]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch (NumPy), as `local_rows` names them, as global arrays on the mesh.

    The rows are whole; a device takes its own columns of them.
    """
    sharding = shardings(mesh, BATCH_AXES)
    parts = mesh_parts(mesh, BATCH_AXES[0])
    mine = local_rows(mesh, (parts, mesh_parts(mesh, BATCH_AXES[1])))  # in units of a device's rows

    def put(rows):
        size = len(rows) // (mine.stop - mine.start)
        total, before = parts * size, mine.start * size

        def piece(index):
            start, stop, _ = index[0].indices(total)
            return rows[start - before : stop - before, index[1]]

        return jax.make_array_from_callback((total, rows.shape[1]), sharding, piece)

    return jax.tree.map(put, batch)


def make_train_step(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer):
    """The step as a plain function; `jit_train_step` compiles it for a mesh."""

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        state = state._replace(opt_state=fetched(optimizer, state.opt_state))
        scale = 1.0 if state.scale is None else state.scale.value
        grads, metrics = gradients(blueprint, train, state.params, batch, scale)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.transform.update(
            clip(grads, norm, optimizer.clip_norm), state.opt_state, state.params
        )
        params, average = optax.apply_updates(state.params, updates), state.average
        metrics |= {"grad_norm": norm, "learning_rate": optimizer.learning_rate(state.step)}
        if average is not None and train.average is not None:
            average = _averaged(average, params, state.step, train.average)
        new = State(state.step + 1, params, opt_state, state.scale, average)
        if state.scale is not None:
            finite = jnp.isfinite(norm)
            kept = where_finite(finite, new, state._replace(step=new.step))
            new = kept._replace(scale=state.scale.adjusted(finite))
            metrics["loss_scale"] = state.scale.value
        return new._replace(opt_state=put_back(optimizer, new.opt_state)), metrics

    return train_step


def _averaged(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """An exponential moving average over steps. Young ones decay faster, so that the start is soon forgotten
    (the rule of TensorFlow's ExponentialMovingAverage: at most (1 + n) / (10 + n) after n updates).
    """
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), average, params)


def state_shardings(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer, mesh: Mesh) -> State:
    """Where each array of the state lives."""
    params, everywhere = shardings(mesh, blueprint.axes), shardings(mesh, ())
    opt_state = optimizer_shardings(optimizer, blueprint.shapes, params, mesh)
    scale = LossScale(everywhere, everywhere) if train.dtype == "float16" else None
    return State(everywhere, params, opt_state, scale, params if train.average else None)


def first_step(train: TrainConfig, optimizer: Optimizer, params: Params) -> State:
    """The state before the first step, from `params`."""
    scale = LossScale.initial() if train.dtype == "float16" else None
    average = jax.tree.map(jnp.copy, params) if train.average else None  # both are donated
    return State(jnp.int32(0), params, optimizer.transform.init(params), scale, average)


def init_state(
    blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer, mesh: Mesh, seed: int
) -> State:
    """Fresh parameters before the first step, made in place on the mesh; the same bits on every mesh."""

    def make(key):
        return first_step(train, optimizer, blueprint.init(key))

    where = state_shardings(blueprint, train, optimizer, mesh)
    return jax.jit(make, out_shardings=where)(jax.random.key(seed))


def split(state: State) -> tuple[Params, dict[str, Any]]:
    """A state as it stands in a checkpoint: the model that others read, and what only training needs."""
    rest = {"opt_state": state.opt_state, "scale": state.scale}
    if state.average is not None:
        rest["params"] = state.params
    return state.model, {name: tree for name, tree in rest.items() if tree is not None}


def join(step: jax.Array, model: Params, rest: dict[str, Any]) -> State:
    """The inverse of `split`."""
    params, average = (rest["params"], model) if "params" in rest else (model, None)
    return State(step, params, rest["opt_state"], rest.get("scale"), average)


def jit_train_step(blueprint: Blueprint, train: TrainConfig, optimizer: Optimizer, mesh: Mesh):
    """`make_train_step`, compiled for the mesh: shardings from the parameters' metadata, state donated."""
    state = state_shardings(blueprint, train, optimizer, mesh)
    return jax.jit(
        make_train_step(blueprint, train, optimizer),
        in_shardings=(state, shardings(mesh, BATCH_AXES)),
        out_shardings=(state, shardings(mesh, ())),
        donate_argnums=0,
    )
