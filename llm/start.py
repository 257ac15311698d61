"""The state a run starts from: fresh, another run's weights, or its own newest checkpoint."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core.checkpoint import Checkpointer, newest_params
from core.config import load, to_dict
from core.errors import UserError
from core.mesh import shardings
from core.module import Blueprint, Params
from core.run import RunFolder
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint
from llm.prepare import Text
from llm.rewind import merged, read_rewinds
from llm.setup import Setup
from llm.step import State, first_step, init_state, join, split, state_shardings

_log = logging.getLogger(__name__)


def first_state(setup: Setup, checkpointer: Checkpointer) -> State:
    """The newest intact checkpoint's state; without one, that of step 0.

    A checkpoint of step 0 holds the weights that the run was imported with, and was trained on nothing here.

    Raises:
        UserError: if the checkpoint was trained on another corpus or with another tokenizer, or passed over
            batches that the run's record doesn't name.
    """
    step = checkpointer.newest_intact()
    if step == 0:
        _log.info("starting from the imported weights in %s", checkpointer.folder / "0")
    elif step is not None:
        _require_same_text(checkpointer, step, setup.text)
        _require_record(checkpointer, step, setup.run)
        _log.info("resuming from step %d", step)
    return state_at(setup, checkpointer, step or 0)


def state_at(setup: Setup, checkpointer: Checkpointer, step: int) -> State:
    """The state that the checkpoint of `step` holds; at step 0 that of weights that were imported, of
    `init.from`'s or of fresh ones.
    """
    experiment, model, optimizer, mesh = setup.experiment, setup.model, setup.optimizer, setup.mesh
    train = experiment.train
    where = state_shardings(model, train, optimizer, mesh)
    if step == 0:
        if 0 in checkpointer.steps():
            params = checkpointer.restore_params(0, _targets(model.shapes, shardings(mesh, model.axes)))
        elif experiment.init.source is None:
            return init_state(model, train, optimizer, mesh, experiment.seed)
        else:
            params = load_params(RunFolder.open(Path(experiment.init.source)), experiment.model, model, mesh)
        make = functools.partial(first_step, train, optimizer)
        return jax.jit(make, out_shardings=where)(params)
    shapes = jax.eval_shape(functools.partial(first_step, train, optimizer), model.shapes)
    targets = map(_targets, split(shapes), split(where))
    params, rest = checkpointer.restore(step, *targets)
    return join(jax.device_put(jnp.int32(step), where.step), params, rest)


def _require_same_text(checkpointer: Checkpointer, step: int, text: Text) -> None:
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
    if meta["selection_fingerprint"] != text.identity["selection_fingerprint"]:
        raise UserError(
            f"data.selection has changed since checkpoint {step} in {checkpointer.folder} was written: "
            "restore it, or start another run (run.name) that begins from this one (init.from)"
        )


def _require_record(checkpointer: Checkpointer, step: int, run: RunFolder) -> None:
    recorded = [rewind.skipped for rewind in read_rewinds(run.rewinds)]
    passed_over = [tuple(span) for span in checkpointer.read_meta(step)["data"]["skipped"]]
    if merged([*recorded, *passed_over]) != merged(recorded):
        raise UserError(
            f"checkpoint {step} has passed over batches that {run.rewinds} doesn't name: bring that file "
            "back, or later batches would be others than before"
        )


def load_params(run: RunFolder, config: ModelConfig, model: Blueprint, mesh: Mesh) -> Params:
    """The parameters of a run's newest intact checkpoint, placed on the mesh; the optimizer is not read.

    A model that computes otherwise with the same parameters (longer contexts, another rope) may take them,
    which is said.

    Raises:
        UserError: if there is no such run or checkpoint, or its model has another shape.
    """
    trained = load(Experiment, run.config).model
    there, here = to_dict(trained), to_dict(config)
    differing = ", ".join(
        f"model.{key} is {there.get(key)} there and {here.get(key)} here"
        for key in {**here, **there}
        if here.get(key) != there.get(key)
    )
    if _shapes(blueprint(trained)) != _shapes(model):
        raise UserError(
            f"init.from: the model in {run.path} has other parameters than `model` here ({differing}): "
            f"take over the `model` section of {run.config}"
        )
    if differing:
        _log.info("init.from: the weights of %s in another model: %s", run.path, differing)
    return newest_params(run, _targets(model.shapes, shardings(mesh, model.axes)))


def _shapes(model: Blueprint) -> Params:
    return jax.tree.map(lambda s: s.shape, model.shapes)


def _targets(shapes, places):
    """Shapes and dtypes with the sharding each array is to be restored to."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
