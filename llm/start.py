"""The state a run starts from: fresh, another run's weights, or its own newest checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core.checkpoint import Checkpointer
from core.config import load
from core.errors import UserError
from core.mesh import shardings
from core.module import Blueprint, Params
from core.optim import Optimizer
from core.run import RunFolder
from llm.config import Experiment
from llm.model.transformer import blueprint
from llm.prepare import Text
from llm.step import State, init_state, state_shardings

_log = logging.getLogger(__name__)


def first_state(
    experiment: Experiment,
    model: Blueprint,
    optimizer: Optimizer,
    mesh: Mesh,
    checkpointer: Checkpointer,
    text: Text,
) -> State:
    """The newest intact checkpoint's state; without one, `init.from`'s weights or fresh ones at step 0.

    Raises:
        UserError: if the checkpoint was trained on another corpus than `text`, or with another tokenizer.
    """
    step = checkpointer.newest_intact()
    if step is not None:
        meta = checkpointer.read_meta(step)
        if meta["corpus_fingerprint"] != text.identity["corpus_fingerprint"]:
            raise UserError(
                f"the corpus has changed since checkpoint {step} in {checkpointer.folder} was written: "
                "restore it, or start another run (run.name) that begins from this one (init.from)"
            )
        if meta["tokens_fingerprint"] != text.identity["tokens_fingerprint"]:
            raise UserError(
                f"the tokenizer in {text.tokenizer.path} is not the one that checkpoint {step} in "
                f"{checkpointer.folder} was trained with: bring that back, from the run's own tokenizer/"
            )
        _log.info("resuming from step %d", step)
        return _restore(model, optimizer, mesh, checkpointer, step)
    state = init_state(model, optimizer, mesh, experiment.seed)
    if experiment.init.source is not None:
        source = RunFolder.open(Path(experiment.init.source))
        params = load_params(source, model, mesh)
        return State(state.step, params, state.opt_state)
    return state


def _restore(
    model: Blueprint, optimizer: Optimizer, mesh: Mesh, checkpointer: Checkpointer, step: int
) -> State:
    where = state_shardings(model, optimizer, mesh)
    opt_shapes = jax.eval_shape(optimizer.transform.init, model.shapes)
    params, opt_state = checkpointer.restore(
        step, _targets(model.shapes, where.params), _targets(opt_shapes, where.opt_state)
    )
    return State(jax.device_put(jnp.int32(step), where.step), params, opt_state)


def load_params(run: RunFolder, model: Blueprint, mesh: Mesh) -> Params:
    """The parameters of a run's newest intact checkpoint, placed on the mesh; the optimizer is not read.

    Raises:
        UserError: if there is no such run or checkpoint, or its model has another shape.
    """
    trained = load(Experiment, run.config).model
    if _shapes(blueprint(trained)) != _shapes(model):
        raise UserError(
            f"init.from: the model in {run.path} has other parameters than `model` here: "
            f"take over the `model` section of {run.config}"
        )
    with Checkpointer(run.checkpoints) as checkpointer:
        step = checkpointer.newest_intact(optimizer=False)
        if step is None:
            raise UserError(f"init.from: {run.path} has no checkpoint yet")
        return checkpointer.restore_params(step, _targets(model.shapes, shardings(mesh, model.axes)))


def _shapes(model: Blueprint) -> Params:
    return jax.tree.map(lambda s: s.shape, model.shapes)


def _targets(shapes, places):
    """Shapes and dtypes with the sharding each array is to be restored to."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
