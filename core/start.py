"""The state a run starts from: fresh, another run's weights, imported ones, or its own checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from core.checkpoint import Checkpointer, newest_params
from core.errors import UserError
from core.kinds import Kind, require_kind
from core.mesh import shardings
from core.module import Blueprint, Params
from core.optim import Optimizer
from core.run import RunFolder, flatten
from core.state import State, StepOptions, init_state, restored_state, state_from, targets

_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A model with what changes it: all that the layout of its state follows from."""

    model: Blueprint
    train: StepOptions
    optimizer: Optimizer
    mesh: Mesh


def state_at(
    trained: Trained,
    checkpointer: Checkpointer,
    step: int,
    seed: int,
    others: Callable[[], Params] | None = None,
) -> State:
    """The state that the checkpoint of `step` holds; at step 0 that of weights that were imported, of
    `others` (those of `init.from`) or of fresh ones.
    """
    if step > 0:
        return restored_state(*trained, checkpointer, step)
    if 0 in checkpointer.steps():
        places = shardings(trained.mesh, trained.model.axes)
        return state_from(*trained, checkpointer.restore_params(0, targets(trained.model.shapes, places)))
    if others is None:
        return init_state(*trained, seed)
    return state_from(*trained, others())


def initial_run(source: str, kind: Kind) -> RunFolder:
    """The run that `init.from` names. Raises `UserError` where there is none, or one of another kind."""
    try:
        run = RunFolder.open(Path(source))
    except UserError as error:
        raise UserError(
            f"init.from: {error}; train that run first with its own config, start where it lies, or name its "
            "folder with --set init.from=..."
        ) from None
    try:
        require_kind(run.path, run.config, kind)
    except UserError as error:
        raise UserError(f"init.from: {error}") from None
    return run


def load_params(
    run: RunFolder,
    theirs: Blueprint,
    there: Mapping[str, Any],
    ours: Blueprint,
    here: Mapping[str, Any],
    mesh: Mesh,
) -> Params:
    """The parameters of a run's newest intact checkpoint, placed on the mesh; the optimizer is not read.

    A model that computes otherwise with the same parameters (longer contexts, another patch dropout) may take
    them, which is said.

    Args:
        theirs, there: the run's model, and its `model` section.
        ours, here: those of the run that begins.

    Raises:
        UserError: if there is no such checkpoint, or its model has another shape.
    """
    before, now = (dict(flatten({"model": section})) for section in (there, here))
    differing = ", ".join(
        f"{key} is {before.get(key)} there and {now.get(key)} here"
        for key in {**now, **before}
        if now.get(key) != before.get(key)
    )
    if _shapes(theirs) != _shapes(ours):
        raise UserError(
            f"init.from: the model in {run.path} has other parameters than `model` here ({differing}): "
            f"take over the `model` section of {run.config}"
        )
    if differing:
        _log.info("init.from: the weights of %s in another model: %s", run.path, differing)
    return newest_params(run, targets(ours.shapes, shardings(mesh, ours.axes)))


def _shapes(model: Blueprint) -> Params:
    return jax.tree.map(lambda s: s.shape, model.shapes)
