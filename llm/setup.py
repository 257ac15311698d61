"""What a run is made of, checked before its first step: folder, mesh, model, optimizer, text."""

from __future__ import annotations

import logging
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from core.config import to_yaml
from core.distributed import first_before_others, on_first
from core.errors import UserError
from core.kinds import LANGUAGE_MODEL
from core.mesh import check_divides, make_mesh
from core.module import Blueprint
from core.optim import Optimizer, make_optimizer
from core.run import RunFolder
from core.start import initial_run
from llm.config import Experiment
from llm.generate import encode_prompt
from llm.model.attention import choose_backend
from llm.model.ragged import check_path
from llm.model.transformer import Compute, blueprint
from llm.prepare import Text, prepare
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """Nothing here changes while a run trains."""

    experiment: Experiment
    run: RunFolder
    mesh: Mesh
    model: Blueprint
    optimizer: Optimizer
    text: Text


def set_up(experiment: Experiment, resume: bool) -> Setup:
    """Make, or with `resume` take up, the run's folder; make tokenizer and shards where they are missing.

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    if experiment.init.source is not None and not RunFolder(experiment.run.folder).has_checkpoint:
        # Before a folder of this run's stands where it is missing.
        initial_run(experiment.init.source, LANGUAGE_MODEL)
    model, optimizer = _model(experiment, mesh)
    run = RunFolder(experiment.run.folder)
    on_first(lambda: _create(run, experiment, resume))
    text = first_before_others(lambda: prepare(experiment))
    _check_prompts(experiment, text.tokenizer)
    return Setup(experiment, run, mesh, model, optimizer, text)


def _model(experiment: Experiment, mesh: Mesh) -> tuple[Blueprint, Optimizer]:
    options = experiment.train
    backend = choose_backend(
        options.attention,
        jax.default_backend(),
        experiment.model,
        dtype=options.dtype,
        length=experiment.data.sequence_length,
        isolated=experiment.data.isolate,
        context=mesh.shape["context"],
    )
    check_path(options.experts, jax.default_backend(), experiment.model.moe)
    compute = Compute(options.dtype, backend, options.remat, options.scan_layers, options.experts)
    model = blueprint(experiment.model, compute)
    device = jax.devices()[0]
    _log.info(
        "%.1fM parameters on %d x %s; %s products, %s attention%s",
        model.count / 1e6, jax.device_count(), device.device_kind, options.dtype, backend,
        f", {options.experts} experts" if experiment.model.moe else "",
    )  # fmt: skip
    return model, make_optimizer(experiment.optimizer, options.steps, model.decay, model.axes)


def _create(run: RunFolder, experiment: Experiment, resume: bool) -> None:
    RunFolder.create(run.path, to_yaml(experiment), resume)


def check_mesh(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Check that the model and its microbatches divide over the mesh.

    Raises:
        UserError: naming the key that doesn't, and the mesh axes.
    """
    model, data = experiment.model, experiment.data
    if model.moe is not None:
        own = {
            "model.moe.num_experts": ("experts", model.moe.num_experts),
            "model.moe.shared_mlp_dim": ("mlp", model.moe.shared_mlp_dim),
        }
        check_divides(mesh, own)
    elif mesh.shape["expert"] > 1:
        raise UserError(
            f"mesh.expert is {mesh.shape['expert']}, but the model has no experts to divide: use mesh.data"
        )
    check_divides(
        mesh,
        {
            "model.num_heads": ("heads", model.num_heads),
            "model.num_kv_heads": ("kv_heads", model.num_kv_heads),
            "model.embed_dim": ("embed", model.embed_dim),
            "model.mlp_dim": ("mlp", model.mlp_dim),
            "model.vocab_size": ("vocab", model.vocab_size),
            "data.batch_size / train.accumulation": (
                "act_batch",
                data.batch_size // experiment.train.accumulation,
            ),
            "data.sequence_length": ("act_stream", data.sequence_length),
        },
    )


def _check_prompts(experiment: Experiment, tokenizer: Tokenizer) -> None:
    for prompt in experiment.eval.prompts:
        length, most = len(encode_prompt(tokenizer, prompt)), experiment.model.max_length - 1
        if length > most:
            raise UserError(
                f"eval.prompts: {prompt!r} is {length} tokens, and model.max_length leaves room for {most}"
            )
