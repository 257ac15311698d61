"""Pretraining from a configuration to a finished run folder: data, mesh, state, steps, report."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from core.checkpoint import Checkpointer
from core.config import to_dict
from core.distributed import LOST_PEER, AnyProcess, on_first
from core.divergence import Alarm, Monitor
from core.errors import UserError
from core.log import progress
from core.metrics import MetricsWriter, read_metrics
from core.run import RunFolder, plain
from core.signals import Stop
from llm.config import Experiment
from llm.data.loader import Batch, across_documents, train_batch
from llm.data.prefetch import prefetch
from llm.eval.heldout import Evaluate, evaluation_batches, make_evaluate
from llm.generate import sample_texts
from llm.meter import Meter
from llm.prepare import token_bytes
from llm.report import append_samples, finish
from llm.rewind import Span, append_rewind, batch_of, merged, plan, read_rewinds, rewind_of
from llm.setup import Setup, set_up
from llm.start import first_state, state_at
from llm.step import State, jit_train_step, local_rows, put_batch, split

_log = logging.getLogger(__name__)


class Programs(NamedTuple):
    """What is compiled once for a run, however often it is rewound."""

    train_step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    evaluate: Evaluate


def train(experiment: Experiment, *, resume: bool = False, profile: int | None = None) -> None:
    """Train until `train.steps`, or until SIGTERM or Ctrl-C, which save and return.

    With several processes each calls this, and a signal to one stops all. The first writes the run's folder,
    which all of them see.

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    setup = set_up(experiment, resume)
    run, steps, keep = setup.run, experiment.train.steps, experiment.checkpoint.keep
    # Signals are minded until the last save, which the checkpointer waits for, is on the disk.
    with jax.set_mesh(setup.mesh), Stop() as stop, Checkpointer(run.checkpoints, keep) as checkpointer:
        state = first_state(setup, checkpointer)
        start = int(state.step)
        if profile is not None and not start < profile <= steps:
            raise UserError(f"--profile {profile}: the steps to do are those after {start} up to {steps}")
        on_first(lambda: setup.text.tokenizer.save(run.tokenizer))
        programs = _compile(setup)
        stopping = AnyProcess(lambda: stop.signal is not None, setup.mesh)
        state, outcome = _run_steps(setup, programs, state, checkpointer, stopping, profile)
        while isinstance(outcome, Alarm):
            del state  # or the device would hold two of them
            state = _rewind(setup, outcome, checkpointer)
            state, outcome = _run_steps(setup, programs, state, checkpointer, stopping, profile)
    done = int(state.step)
    if done < steps:
        reason = stop.signal or "another process is told to stop"
        _log.info("%s: saved step %d in %s; go on with --resume", reason, done, run.path)
        if stop.signal is None:
            sys.exit(LOST_PEER)  # so that a supervisor knows that this one could go on
    else:
        on_first(lambda: finish(run, experiment, setup.text, setup.model.count, outcome))


def _compile(setup: Setup) -> Programs:
    experiment, mesh = setup.experiment, setup.mesh
    lengths = token_bytes(setup.text.tokenizer, experiment.model.vocab_size)
    return Programs(
        jit_train_step(setup.model, experiment.train, setup.optimizer, mesh),
        make_evaluate(setup.model, experiment.train.loss_chunk, lengths, mesh),
    )


def _run_steps(
    setup: Setup,
    programs: Programs,
    state: State,
    checkpointer: Checkpointer,
    stopping: AnyProcess,
    profile: int | None,
) -> tuple[State, list[str] | Alarm]:
    """The state after the last step and the samples of the last evaluation; or what went wrong before it."""
    experiment, run, mesh = setup.experiment, setup.run, setup.mesh
    steps, start = experiment.train.steps, int(state.step)
    skipped = [rewind.skipped for rewind in read_rewinds(run.rewinds)]
    batches = prefetch(_batches(setup, start, skipped))
    meter = Meter(experiment, mesh)
    samples = _sample(setup, state, start) if start == steps else []  # of a run that is done already
    with (
        contextlib.closing(batches),
        MetricsWriter(run, start) as writer,
        progress("training", steps, start) as update,
        contextlib.ExitStack() as tracing,
    ):
        monitor = _monitor(setup)
        for step in range(start + 1, steps + 1):
            with meter.lap("data"):
                batch = put_batch(next(batches), mesh)
            _profile(tracing, run, profile, step)
            state, metrics = programs.train_step(state, batch)
            stopping.ask()
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            values |= meter.measure(step)
            alarm = monitor.observe(step, values)
            if alarm is None and _is_due(experiment.eval.every, step, steps):
                with meter.lap("evaluation"):
                    figures = _evaluate(setup, programs.evaluate, state, step)
                    values |= figures
                    if step < steps:  # the last evaluation is of more text, and its figures of their own
                        alarm = monitor.observe_evaluation(step, figures)
                    if alarm is None:
                        samples = _sample(setup, state, step)
            writer.write(step, values)  # before the checkpoint that stands for having done this step
            if alarm is not None:
                return state, alarm
            update(step, f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s")
            last = stopping.answer()
            if last or _is_due(experiment.checkpoint.every, step, steps):
                with meter.lap("checkpoint"):
                    _save(setup, state, step, skipped, monitor.good, checkpointer)
            if last:
                break
    return state, samples


def _is_due(every: int, step: int, last: int) -> bool:
    """Whether what happens each `every` steps and at the last one (0: at that one only) happens now."""
    return step == last or (every > 0 and step % every == 0)


def _monitor(setup: Setup) -> Monitor:
    """A monitor that has seen what the run's metrics hold."""
    monitor = Monitor(setup.experiment.divergence)
    for line in read_metrics(setup.run.metrics):
        monitor.observe(int(line["step"]), line)
        if "heldout_loss" in line and line["step"] < setup.experiment.train.steps:
            monitor.observe_evaluation(int(line["step"]), line)
    return monitor


def _rewind(setup: Setup, alarm: Alarm, checkpointer: Checkpointer) -> State:
    """The state to go on from after `alarm`; what was skipped and why is in the run's record."""
    checkpointer.wait()
    rewind = rewind_of(on_first(lambda: _plan(setup, alarm, checkpointer)))
    # In this order: whatever a kill comes between, a resumed run goes on before the bad batches.
    checkpointer.discard_after(rewind.restored)
    on_first(lambda: append_rewind(setup.run.rewinds, rewind))
    _log.warning(
        "step %d: %s; back to step %d, past batches %d to %d (%s)",
        alarm.step, alarm.reason, rewind.restored, rewind.skipped[0], rewind.skipped[1] - 1,
        setup.run.rewinds,
    )  # fmt: skip
    return state_at(setup, checkpointer, rewind.restored)


def _plan(setup: Setup, alarm: Alarm, checkpointer: Checkpointer) -> dict[str, Any]:
    """Where to go back to, and what is lost by it."""
    run = setup.run
    before = read_rewinds(run.rewinds)
    rewind = plan(alarm, before, checkpointer.intact_steps(), setup.experiment.divergence)
    lost = [line["loss"] for line in read_metrics(run.metrics) if line["step"] > rewind.restored]
    return rewind._replace(lost_loss=[plain(loss) for loss in lost])._asdict()


def _batches(setup: Setup, start: int, skipped: Sequence[Span]) -> Iterator[Batch]:
    """This process's rows of the batch of each step from `start` on."""
    data = setup.experiment.data
    rows = local_rows(setup.mesh, (data.batch_size, data.sequence_length))
    for step in range(start, setup.experiment.train.steps):
        number = batch_of(step, skipped)
        batch = train_batch(setup.text.train, number, data.batch_size, setup.experiment.seed, rows)
        yield batch if data.isolate else across_documents(batch)


def _evaluate(setup: Setup, evaluate: Evaluate, state: State, step: int) -> dict[str, float]:
    final = step == setup.experiment.train.steps
    batches = evaluation_batches(setup.experiment, setup.text.heldout, setup.mesh, final=final)
    return evaluate(state.model, batches)


def _sample(setup: Setup, state: State, step: int) -> list[str]:
    """Each of `eval.prompts` and what follows it; also added to the run's samples."""
    experiment, options = setup.experiment, setup.experiment.eval
    if not options.prompts:
        return []
    texts = sample_texts(
        experiment.model,
        state.model,
        setup.text.tokenizer,
        options.prompts,
        options.sample_tokens,
        dtype=experiment.train.dtype,
    )
    samples = [prompt + text for prompt, text in zip(options.prompts, texts, strict=True)]
    on_first(lambda: append_samples(setup.run, step, samples))
    return samples


def _save(
    setup: Setup, state: State, step: int, skipped: Sequence[Span], good: int, checkpointer: Checkpointer
) -> None:
    """Save, and keep what a divergence that only begins to show would go back to."""
    meta = {
        "config": to_dict(setup.experiment),
        "data": {"next_step": batch_of(step, skipped), "skipped": merged(skipped)},
        **setup.text.identity,
    }
    checkpointer.save(step, *split(state), meta, hold=(good - setup.experiment.divergence.skip, good))


def _profile(tracing: contextlib.ExitStack, run: RunFolder, first: int | None, step: int) -> None:
    """Trace three steps, fewer where the run ends before, to be opened in TensorBoard or Perfetto."""
    if step == first:
        folder = run.path / "profile"
        tracing.callback(_log.info, "profile from step %d on: %s", first, folder)
        tracing.enter_context(jax.profiler.trace(folder))
    elif first is not None and step == first + 3:
        tracing.close()
