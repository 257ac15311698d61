"""Contrastive training from a configuration to a finished run folder: data, mesh, state, steps, report."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import jax

from clip.config import Experiment
from clip.data.batches import Batch, batches
from clip.eval.heldout import make_measure
from clip.gradients import clamp, gradients
from clip.report import finish
from clip.setup import Setup, set_up
from clip.start import require_same_data, state_at
from core import loop
from core.config import to_dict
from core.distributed import on_first
from core.loop import Task
from core.mesh import local_rows, put_rows
from core.meter import Meter
from core.metrics import read_metrics
from core.state import State, jit_step, make_step, state_shardings


def train(experiment: Experiment, *, resume: bool = False, profile: int | None = None) -> None:
    """Train until `train.steps`, or until SIGTERM or Ctrl-C, which save and return (`core.loop.train`).

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    setup = set_up(experiment, resume)
    before = read_metrics(setup.run.metrics)
    done = loop.train(lambda: task_of(setup), setup.run, setup.mesh, experiment.checkpoint, profile)
    if done is not None:
        on_first(lambda: finish(setup.run, setup.model.count, before))


def task_of(setup: Setup) -> Task[Batch]:
    """Contrastive training as `core.loop` runs it."""
    experiment, mesh, options = setup.experiment, setup.mesh, setup.experiment.train
    measure = make_measure(
        setup.model, experiment.model, experiment.data, setup.tokenizer, setup.splits.heldout, mesh
    )

    def evaluate(state: State, step: int) -> dict[str, float]:
        limit = None if step == options.steps else experiment.eval.images
        return measure(state.model, limit).figures()

    return Task(
        run=setup.run,
        steps=options.steps,
        eval_every=experiment.eval.every,
        checkpoint=experiment.checkpoint,
        divergence=experiment.divergence,
        state_at=lambda checkpointer, step: state_at(setup, checkpointer, step),
        batches=lambda numbers: _batches(setup, numbers),
        put=lambda batch: put_rows(batch, mesh),
        step=_jit_train_step(setup),
        evaluate=evaluate,
        show=lambda state, step: None,
        meta={"config": to_dict(experiment), **setup.identity},
        check=lambda step, meta: require_same_data(setup, step, meta),
        begin=lambda: setup.tokenizer.save(setup.run.tokenizer),
        meter=lambda: Meter("images", experiment.data.batch_size, None, options.dtype, mesh),
    )


def _jit_train_step(setup: Setup):
    experiment, options = setup.experiment, setup.experiment.train

    def mean_gradients(params, batch, scale, step):
        key = jax.random.fold_in(jax.random.key(experiment.seed), step)  # of the patches to drop
        return gradients(setup.model, options, params, batch, key, scale)

    step = make_step(mean_gradients, options, setup.optimizer, constrain=clamp)
    where = state_shardings(setup.model, options, setup.optimizer, setup.mesh)
    return jit_step(step, where, ("act_batch",), setup.mesh)


def _batches(setup: Setup, numbers: Iterable[int]) -> Generator[Batch, None, None]:
    """This process's rows of the batches with these numbers."""
    experiment = setup.experiment
    return batches(
        setup.splits.train,
        setup.tokenizer,
        experiment.data,
        size=experiment.model.image.size,
        length=experiment.model.text.length,
        numbers=numbers,
        seed=experiment.seed,
        rows=local_rows(setup.mesh, experiment.data.batch_size),
    )
