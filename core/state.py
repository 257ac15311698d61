"""The state of training and the step that changes it: `step(state, batch) -> (state, metrics)`.

What is trained comes in as a function that gives gradients; the optimizer, loss scaling, averaging and the
way in and out of a checkpoint are the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from core.checkpoint import Checkpointer
from core.loss_scale import LossScale, where_finite
from core.mesh import shardings
from core.module import Blueprint, Params
from core.optim import Optimizer, clip, fetched, put_back
from core.optim import state_shardings as optimizer_shardings

Metrics = dict[str, jax.Array]
# Of parameters, a batch, the factor on the loss and the step: the mean gradient and what it was made of.
Gradients = Callable[[Params, Any, jax.Array | float, jax.Array], tuple[Params, Metrics]]


@runtime_checkable
class StepOptions(Protocol):
    """What the state depends on, in the `train` section of a configuration."""

    @property
    def dtype(self) -> str: ...

    @property
    def average(self) -> float | None: ...


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


def make_step(
    gradients: Gradients,
    train: StepOptions,
    optimizer: Optimizer,
    constrain: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The step as a plain function; `jit_step` compiles it for a mesh.

    Args:
        gradients: of the mean loss, with `loss` among the metrics.
        constrain: what the parameters are held to after each update.
    """

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        state = state._replace(opt_state=fetched(optimizer, state.opt_state))
        scale = 1.0 if state.scale is None else state.scale.value
        grads, metrics = gradients(state.params, batch, scale, state.step)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.transform.update(
            clip(grads, norm, optimizer.clip_norm), state.opt_state, state.params
        )
        params, average = constrain(optax.apply_updates(state.params, updates)), state.average
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

    return step


def _averaged(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """An exponential moving average over steps. Young ones decay faster, so that the start is soon forgotten
    (the rule of TensorFlow's ExponentialMovingAverage: at most (1 + n) / (10 + n) after n updates).
    """
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), average, params)


def jit_step(
    step: Callable[[State, Any], tuple[State, Metrics]], state: State, batch_axes: tuple[str, ...], mesh: Mesh
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """`step` compiled for the mesh, its state donated.

    Args:
        state: the shardings of its arrays, as `state_shardings` gives them.
        batch_axes: logical axes of a batch's arrays, from the first dimension on.
    """
    return jax.jit(
        step,
        in_shardings=(state, shardings(mesh, batch_axes)),
        out_shardings=(state, shardings(mesh, ())),
        donate_argnums=0,
    )


def state_shardings(blueprint: Blueprint, train: StepOptions, optimizer: Optimizer, mesh: Mesh) -> State:
    """Where each array of the state lives."""
    params, everywhere = shardings(mesh, blueprint.axes), shardings(mesh, ())
    opt_state = optimizer_shardings(optimizer, blueprint.shapes, params, mesh)
    scale = LossScale(everywhere, everywhere) if train.dtype == "float16" else None
    return State(everywhere, params, opt_state, scale, params if train.average else None)


def first_step(train: StepOptions, optimizer: Optimizer, params: Params) -> State:
    """The state before the first step, from `params`."""
    scale = LossScale.initial() if train.dtype == "float16" else None
    average = jax.tree.map(jnp.copy, params) if train.average else None  # both are donated
    return State(jnp.int32(0), params, optimizer.transform.init(params), scale, average)


def init_state(
    blueprint: Blueprint, train: StepOptions, optimizer: Optimizer, mesh: Mesh, seed: int
) -> State:
    """Fresh parameters before the first step, made in place on the mesh; the same bits on every mesh."""

    def make(key):
        return first_step(train, optimizer, blueprint.init(key))

    where = state_shardings(blueprint, train, optimizer, mesh)
    return jax.jit(make, out_shardings=where)(jax.random.key(seed))


def state_from(
    blueprint: Blueprint, train: StepOptions, optimizer: Optimizer, mesh: Mesh, params: Params
) -> State:
    """`first_step` on the mesh, of parameters that are there already."""
    where = state_shardings(blueprint, train, optimizer, mesh)
    return jax.jit(functools.partial(first_step, train, optimizer), out_shardings=where)(params)


def restored_state(
    blueprint: Blueprint,
    train: StepOptions,
    optimizer: Optimizer,
    mesh: Mesh,
    checkpointer: Checkpointer,
    step: int,
) -> State:
    """The state that the checkpoint of `step` holds. Raises `UserError` as `Checkpointer.restore` does."""
    where = state_shardings(blueprint, train, optimizer, mesh)
    shapes = jax.eval_shape(functools.partial(first_step, train, optimizer), blueprint.shapes)
    params, rest = checkpointer.restore(step, *map(targets, split(shapes), split(where)))
    return join(jax.device_put(jnp.int32(step), where.step), params, rest)


def targets(shapes: Any, places: Any) -> Any:
    """Shapes and dtypes with the sharding each array is to be restored to."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


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
