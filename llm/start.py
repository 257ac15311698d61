"""The state a run of pretraining starts from, and whether it may go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from core import start
from core.checkpoint import Checkpointer
from core.config import load, to_dict
from core.errors import UserError
from core.kinds import LANGUAGE_MODEL
from core.module import Blueprint, Params
from core.start import Trained, initial_run, load_params
from core.state import State
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint
from llm.setup import Setup


def state_at(setup: Setup, checkpointer: Checkpointer, step: int) -> State:
    """The state of a run at `step`, see `core.start.state_at`."""
    experiment, mesh = setup.experiment, setup.mesh
    trained = Trained(setup.model, experiment.train, setup.optimizer, mesh)
    source = experiment.init.source
    others = None if source is None else lambda: _others(source, experiment.model, setup.model, mesh)
    return start.state_at(trained, checkpointer, step, experiment.seed, others)


def _others(source: str, config: ModelConfig, model: Blueprint, mesh: Mesh) -> Params:
    run = initial_run(source, LANGUAGE_MODEL)
    theirs = load(Experiment, run.config).model
    return load_params(run, blueprint(theirs), to_dict(theirs), model, to_dict(config), mesh)


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
