"""The optimizer and its learning rate, from `OptimizerConfig`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.errors import UserError
from core.module import Params
from core.options import OptimizerConfig


class Optimizer(NamedTuple):
    """`init` and `update` as optax has them, on gradients that are clipped already."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    clip_norm: float | None


def make_optimizer(options: OptimizerConfig, steps: int, decay: Params) -> Optimizer:
    """AdamW or SGD over `steps` steps; weight decay only where the pytree `decay` is True.

    Raises:
        UserError: if a key of `options.rates` is the path of no parameter.
    """
    schedule = learning_rate(options, steps)
    if options.name == "sgd":
        return Optimizer(optax.scale_by_learning_rate(schedule), schedule, options.clip_norm)
    transform = optax.chain(
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        _scale_by_path(options.rates, decay),
        optax.add_decayed_weights(options.weight_decay, mask=decay),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule, options.clip_norm)


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


def state_shardings(optimizer: Optimizer, shapes: Params, params: Params, mesh: Mesh):
    """Shardings of the optimizer's state: moments as their parameters' (`params`), the rest replicated."""
    state = jax.eval_shape(optimizer.transform.init, shapes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer.transform, lambda _, own: own, state, params, transform_non_params=lambda _: everywhere
    )
