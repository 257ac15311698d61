"""Pretraining from a configuration to a finished run folder: data, mesh, state, steps, report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from core.checkpoint import Checkpointer
from core.config import to_dict, to_yaml
from core.errors import UserError
from core.log import progress
from core.mesh import check_divides, make_mesh
from core.metrics import MetricsWriter
from core.module import Blueprint
from core.optim import Optimizer, make_optimizer
from core.run import RunFolder
from core.signals import Stop
from llm.config import Experiment
from llm.data.loader import Batch, across_documents, train_batch
from llm.data.prefetch import prefetch
from llm.eval.heldout import Evaluate, evaluation_batches, make_evaluate
from llm.generate import encode_prompt, sample_texts
from llm.meter import Meter
from llm.model.attention import choose_backend
from llm.model.transformer import Compute, blueprint
from llm.prepare import Text, prepare, token_bytes
from llm.report import append_samples, finish
from llm.start import first_state
from llm.step import State, jit_train_step, local_rows, put_batch
from llm.tokenizer import Tokenizer
from llm.tokenizer.files import copy

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """What a run is made of; nothing here changes while it trains."""

    experiment: Experiment
    run: RunFolder
    mesh: Mesh
    model: Blueprint
    optimizer: Optimizer
    text: Text


def train(experiment: Experiment, *, resume: bool = False, profile: int | None = None) -> None:
    """Train until `train.steps`, or until SIGTERM or Ctrl-C, which save and return.

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    if jax.process_count() > 1:
        raise UserError("training with several processes is not supported yet: start one")
    mesh = make_mesh(experiment.mesh)
    _check_mesh(experiment, mesh)
    model, optimizer = _model(experiment)
    run = RunFolder.create(experiment.run.folder, to_yaml(experiment), resume)
    text = prepare(experiment)
    _check_prompts(experiment, text.tokenizer)
    setup = Setup(experiment, run, mesh, model, optimizer, text)
    keep = experiment.checkpoint.keep
    # Signals are minded until the last save, which the checkpointer waits for, is on the disk.
    with jax.set_mesh(mesh), Stop() as stop, Checkpointer(run.checkpoints, keep) as checkpointer:
        state = first_state(experiment, setup.model, setup.optimizer, mesh, checkpointer, text)
        start, steps = int(state.step), experiment.train.steps
        if profile is not None and not start < profile <= steps:
            raise UserError(f"--profile {profile}: the steps to do are those after {start} up to {steps}")
        copy(text.tokenizer.folder, run.tokenizer)
        state, samples = _run_steps(setup, state, checkpointer, stop, profile)
    done = int(state.step)
    if done < experiment.train.steps:
        _log.info("%s: saved step %d in %s; go on with --resume", stop.signal, done, run.path)
    else:
        finish(run, experiment, text, setup.model.count, samples)


def _model(experiment: Experiment) -> tuple[Blueprint, Optimizer]:
    options = experiment.train
    backend = choose_backend(
        options.attention,
        jax.default_backend(),
        experiment.model,
        dtype=options.dtype,
        length=experiment.data.sequence_length,
        isolated=experiment.data.isolate,
        divided=experiment.mesh.context != 1,
    )
    model = blueprint(experiment.model, Compute(options.dtype, backend, options.remat, options.scan_layers))
    device = jax.devices()[0]
    _log.info(
        "%.1fM parameters on %d x %s; %s products, %s attention",
        model.count / 1e6, jax.device_count(), device.device_kind, options.dtype, backend,
    )  # fmt: skip
    return model, make_optimizer(experiment.optimizer, options.steps, model.decay, model.axes)


def _check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    model, data = experiment.model, experiment.data
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
            "data.sequence_length": ("act_seq", data.sequence_length),
        },
    )


def _check_prompts(experiment: Experiment, tokenizer: Tokenizer) -> None:
    for prompt in experiment.eval.prompts:
        length, most = len(encode_prompt(tokenizer, prompt)), experiment.model.max_length - 1
        if length > most:
            raise UserError(
                f"eval.prompts: {prompt!r} is {length} tokens, and model.max_length leaves room for {most}"
            )


def _run_steps(
    setup: Setup, state: State, checkpointer: Checkpointer, stop: Stop, profile: int | None
) -> tuple[State, list[str]]:
    """The state after the last step, and the samples of the last evaluation."""
    experiment, run, mesh = setup.experiment, setup.run, setup.mesh
    steps, start = experiment.train.steps, int(state.step)
    train_step = jit_train_step(setup.model, experiment.train, setup.optimizer, mesh)
    lengths = token_bytes(setup.text.tokenizer, experiment.model.vocab_size)
    evaluate = make_evaluate(setup.model, experiment.train.loss_chunk, lengths, mesh)
    meter = Meter(experiment, mesh)
    batches = prefetch(_batches(setup, start))
    samples: list[str] = []
    with (
        MetricsWriter(run, start) as writer,
        progress("training", steps, start) as update,
        contextlib.ExitStack() as tracing,
    ):
        for step in range(start + 1, steps + 1):
            with meter.lap("data"):
                batch = put_batch(next(batches), mesh)
            _profile(tracing, run, profile, step)
            state, metrics = train_step(state, batch)
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            values |= meter.measure(step)
            last = step == steps or stop.signal is not None
            if step == steps or (experiment.eval.every and step % experiment.eval.every == 0):
                with meter.lap("evaluation"):
                    values |= _evaluate(setup, evaluate, state, step)
                    samples = _sample(setup, state, step)
            writer.write(step, values)  # before the checkpoint that stands for having done this step
            update(step, f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s")
            if last or step % experiment.checkpoint.every == 0:
                with meter.lap("checkpoint"):
                    _save(setup, state, step, checkpointer)
            if last:
                break
    batches.close()
    return state, samples


def _batches(setup: Setup, start: int) -> Iterator[Batch]:
    """This process's rows of the batch of each step from `start` on."""
    data = setup.experiment.data
    rows = local_rows(setup.mesh, (data.batch_size, data.sequence_length))
    for step in range(start, setup.experiment.train.steps):
        batch = train_batch(setup.text.train, step, data.batch_size, setup.experiment.seed, rows)
        yield batch if data.isolate else across_documents(batch)


def _evaluate(setup: Setup, evaluate: Evaluate, state: State, step: int) -> dict[str, float]:
    final = step == setup.experiment.train.steps
    batches = evaluation_batches(setup.experiment, setup.text.heldout, setup.mesh, final=final)
    return evaluate(state.params, batches)


def _sample(setup: Setup, state: State, step: int) -> list[str]:
    """Each of `eval.prompts` and what follows it; also added to the run's samples."""
    experiment, options = setup.experiment, setup.experiment.eval
    if not options.prompts:
        return []
    texts = sample_texts(
        experiment.model,
        state.params,
        setup.text.tokenizer,
        options.prompts,
        options.sample_tokens,
        dtype=experiment.train.dtype,
    )
    samples = [prompt + text for prompt, text in zip(options.prompts, texts, strict=True)]
    append_samples(setup.run, step, samples)
    return samples


def _save(setup: Setup, state: State, step: int, checkpointer: Checkpointer) -> None:
    meta = {
        "config": to_dict(setup.experiment),
        "data": {"next_step": step, "skipped": []},
        **setup.text.identity,
    }
    checkpointer.save(step, state.params, state.opt_state, meta)


def _profile(tracing: contextlib.ExitStack, run: RunFolder, first: int | None, step: int) -> None:
    """Trace three steps, fewer where the run ends before, to be opened in TensorBoard or Perfetto."""
    if step == first:
        folder = run.path / "profile"
        tracing.callback(_log.info, "profile from step %d on: %s", first, folder)
        tracing.enter_context(jax.profiler.trace(folder))
    elif first is not None and step == first + 3:
        tracing.close()
