"""The state a run starts from: fresh, another run's weights, or its own newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from core.checkpoint import Checkpointer, newest_params
from core.config import load, to_dict
from core.errors import UserError
from core.mesh import shardings
from core.module import Blueprint, Params
from core.run import RunFolder
from core.state import State, init_state, restored_state, state_from, targets
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint
from llm.setup import Setup

_log = logging.getLogger(__name__)


def state_at(setup: Setup, checkpointer: Checkpointer, step: int) -> State:
    """The state that the checkpoint of `step` holds; at step 0 that of weights that were imported, of
    `init.from`'s or of fresh ones.
    """
    experiment, model, mesh = setup.experiment, setup.model, setup.mesh
    made_of = model, experiment.train, setup.optimizer, mesh
    if step > 0:
        return restored_state(*made_of, checkpointer, step)
    if 0 in checkpointer.steps():
        params = checkpointer.restore_params(0, targets(model.shapes, shardings(mesh, model.axes)))
        return state_from(*made_of, params)
    if experiment.init.source is None:
        return init_state(*made_of, experiment.seed)
    return state_from(
        *made_of, load_params(RunFolder.open(Path(experiment.init.source)), experiment.model, model, mesh)
    )


def require_same_text(setup: Setup, step: int, meta: Mapping[str, Any]) -> None:
    """Raise `UserError` if the run's checkpoint of `step` was trained on another corpus, with another
    tokenizer or another selection.
    """
    text, folder = setup.text, setup.run.checkpoints
    if meta["corpus_fingerprint"] != text.identity["corpus_fingerprint"]:
        raise UserError(
            f"the corpus has changed since checkpoint {step} in {folder} was written: "
            "restore it, or start another run (run.name) that begins from this one (init.from)"
        )
    if meta["tokens_fingerprint"] != text.identity["tokens_fingerprint"]:
        raise UserError(
            f"the tokenizer in {text.tokenizer.path} is not the one that checkpoint {step} in "
            f"{folder} was trained with: bring that back, from the run's own tokenizer/"
        )
    if meta["selection_fingerprint"] != text.identity["selection_fingerprint"]:
        raise UserError(
            f"data.selection has changed since checkpoint {step} in {folder} was written: "
            "restore it, or start another run (run.name) that begins from this one (init.from)"
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
    return newest_params(run, targets(model.shapes, shardings(mesh, model.axes)))


def _shapes(model: Blueprint) -> Params:
    return jax.tree.map(lambda s: s.shape, model.shapes)
