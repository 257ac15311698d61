"""The optimizer and its learning rate, from `OptimizerConfig`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from optax import contrib

from core.errors import UserError
from core.module import Params
from core.options import OptimizerConfig

STACKED = ("layers", "experts")  # axes along which a parameter holds many matrices


class Optimizer(NamedTuple):
    """`init` and `update` as optax has them, on gradients that are clipped already."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    clip_norm: float | None
    offload: bool = False  # the state lives in the host's memory between updates


def make_optimizer(options: OptimizerConfig, steps: int, decay: Params, axes: Params) -> Optimizer:
    """The optimizer by name over `steps` steps.

    Args:
        decay: whether weight decay applies to each parameter.
        axes: each parameter's logical axes.

    Raises:
        UserError: if a key of `options.rates` is the path of no parameter.
    """
    schedule = learning_rate(options, steps)
    if options.name == "sgd":
        return Optimizer(optax.scale_by_learning_rate(schedule), schedule, options.clip_norm, options.offload)
    scale = optax.scale_by_adam(options.beta1, options.beta2, options.epsilon)
    transform = optax.chain(
        scale if options.name == "adamw" else _scale_by_muon(options.momentum, axes, scale),
        _scale_by_path(options.rates, decay),
        optax.add_decayed_weights(options.weight_decay, mask=decay),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule, options.clip_norm, options.offload)


def _scale_by_muon(momentum: float, axes: Params, adam: optax.GradientTransformation):
    """Momentum orthogonalized by Newton-Schulz steps (Jordan 2024) for layers' matrices, `adam` for the rest.

    One learning rate serves both: a matrix's update has the root mean square that Adam's usually has (Liu et
    al. 2025, arXiv:2502.16982).
    """
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    sides = jax.tree.map(lambda names: _sides(names) or optax.MaskedNode(), axes, is_leaf=is_axes)
    labels = jax.tree.map(lambda names: "muon" if _sides(names) else "adam", axes, is_leaf=is_axes)

    def match_adam(update: jax.Array, sides: contrib.MuonDimensionNumbers) -> jax.Array:
        longer = max(math.prod(update.shape[axis] for axis in side) for side in sides)
        return update * (0.2 * math.sqrt(longer))

    muon = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=lambda _: sides),
        optax.stateless(lambda updates, _: jax.tree.map(match_adam, updates, sides)),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _sides(axes: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """Which axes make the rows and the columns of a layer's matrix: `embed`, and all others not stacked."""
    columns = tuple(i for i, axis in enumerate(axes) if axis not in (*STACKED, "embed"))
    if axes[0] != "layers" or "embed" not in axes or not columns:
        return None
    return contrib.MuonDimensionNumbers((axes.index("embed"),), columns)


def _scale_by_path(rates: dict[str, float], params: Params) -> optax.GradientTransformation:
    """Multiply the updates of the parameters whose path, such as `blocks.mlp`, begins as a key of `rates`."""
    if not rates:
        return optax.identity()
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    under = lambda name, key: f"{name}.".startswith(f"{key}.")  # noqa: E731
    for key in rates:
        if not any(under(name, key) for name in names):
            raise UserError(f"optimizer.rates: no parameter's path begins with '{key}'; it is one of {names}")
    factors = [math.prod(rate for key, rate in rates.items() if under(name, key)) for name in names]
    tree = jax.tree.unflatten(structure, factors)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, tree))


def learning_rate(options: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> rate: a linear warm-up, then the schedule by name. Step 0 already moves."""
    peak, warmup, last = options.learning_rate, options.warmup_steps, options.final_fraction
    if options.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=last)
    elif options.schedule == "wsd":
        decay = max(1, min(round(options.decay_fraction * steps), steps - warmup))
        body = optax.linear_schedule(
            peak, last * peak, decay, transition_begin=max(0, steps - decay - warmup)
        )
    else:
        body = optax.constant_schedule(peak)
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), body], [warmup])


def clip(gradients: Params, norm: jax.Array, limit: float | None) -> Params:
    """Scale all gradients so that their global `norm` is at most `limit`."""
    if limit is None:
        return gradients
    scale = jax.numpy.minimum(1.0, limit / norm)
    return jax.tree.map(lambda g: g * scale, gradients)


def state_shardings(optimizer: Optimizer, shapes: Params, params: Params, mesh: Mesh | AbstractMesh):
    """Shardings of the optimizer's state: moments as their parameters' (`params`), the rest replicated.

    With `optimizer.offload` the moments are in the host's memory.
    """
    state = jax.eval_shape(optimizer.transform.init, shapes)
    if optimizer.offload:
        params = jax.tree.map(lambda own: own.with_memory_kind("pinned_host"), params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731  (a parameter of the other optimizer)
    return optax.tree_utils.tree_map_params(
        optimizer.transform,
        lambda moment, own: moment if masked(moment) else own,
        state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )


def fetched(optimizer: Optimizer, state: optax.OptState) -> optax.OptState:
    """The optimizer's state in the device's memory, inside a compiled step."""
    return jax.device_put(state, jax.memory.Space.Device) if optimizer.offload else state


def put_back(optimizer: Optimizer, state: optax.OptState) -> optax.OptState:
    """The inverse of `fetched`: what belongs to parameters to the host, counters stay."""
    if not optimizer.offload:
        return state
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return optax.tree_utils.tree_map_params(
        optimizer.transform,
        lambda x: x if masked(x) else jax.device_put(x, jax.memory.Space.Host),
        state,
        is_leaf=masked,
    )
