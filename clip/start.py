"""The state a contrastive run starts from, and whether it may go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from clip.config import Experiment
from clip.model.config import CLIPConfig
from clip.model.model import blueprint
from clip.setup import Setup
from core import start
from core.checkpoint import Checkpointer
from core.config import load, to_dict
from core.errors import UserError
from core.kinds import DUAL_ENCODER
from core.module import Blueprint, Params
from core.start import Trained, initial_run, load_params
from core.state import State


def state_at(setup: Setup, checkpointer: Checkpointer, step: int) -> State:
    """The state of a run at `step`, see `core.start.state_at`."""
    experiment, mesh = setup.experiment, setup.mesh
    trained = Trained(setup.model, experiment.train, setup.optimizer, mesh)
    source = experiment.init.source
    others = None if source is None else lambda: _others(source, experiment.model, setup.model, mesh)
    return start.state_at(trained, checkpointer, step, experiment.seed, others)


def _others(source: str, config: CLIPConfig, model: Blueprint, mesh: Mesh) -> Params:
    run = initial_run(source, DUAL_ENCODER)
    theirs = load(Experiment, run.config).model
    return load_params(run, blueprint(theirs), to_dict(theirs), model, to_dict(config), mesh)


def require_same_data(setup: Setup, step: int, meta: Mapping[str, Any]) -> None:
    """Raise `UserError` if the run's checkpoint of `step` was trained on other pairs or another tokenizer."""
    folder = setup.run.checkpoints
    if meta["pairs_fingerprint"] != setup.identity["pairs_fingerprint"]:
        raise UserError(
            f"the images or captions have changed since checkpoint {step} in {folder} was written: "
            "restore them, or start another run (run.name) that begins from this one (init.from)"
        )
    if meta["tokenizer_fingerprint"] != setup.identity["tokenizer_fingerprint"]:
        raise UserError(
            f"the tokenizer in {setup.tokenizer.path} is not the one that checkpoint {step} in {folder} was "
            "trained with: bring that back"
        )
