"""The loop of training: batches, steps, figures, evaluations, checkpoints; it stops, resumes and rewinds.

What is trained is a `Task`; nothing here knows what its batches hold.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import Mesh

from core.checkpoint import Checkpointer
from core.distributed import LOST_PEER, AnyProcess, on_first
from core.divergence import Alarm, Monitor
from core.errors import UserError
from core.log import progress
from core.meter import Meter
from core.metrics import MetricsWriter, read_metrics
from core.options import CheckpointConfig, DivergenceConfig
from core.rewind import Span, append_rewind, batch_of, merged, plan, read_rewinds, rewind_of
from core.run import RunFolder, plain
from core.signals import Stop
from core.state import Metrics, State, split

Batch = TypeVar("Batch")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Task(Generic[Batch]):
    """What is trained. Nothing here changes while a run trains, and what is compiled is so once.

    Attributes:
        run: its folder.
        steps: how many, from the first on.
        eval_every: steps between evaluations; 0: at the end only.
        state_at: the state before any step at 0, and that of a checkpoint at its step.
        batches: of the batches with these numbers, the rows that are this process's. Closed when done.
        put: such rows as global arrays on the mesh.
        step: jitted, its state donated; `loss` and `grad_norm` are among the metrics.
        evaluate: the figures of a state at a step.
        show: called after an evaluation without an alarm: what a person looks at.
        meta: what each checkpoint says of the run besides where it stands.
        check: raises `UserError` if the `meta` of a checkpoint is of a run that can't go on as this one.
        begin: called once the run is sure to go on: writes what its folder keeps.
        meter: of the rate of training.
    """

    run: RunFolder
    steps: int
    eval_every: int
    checkpoint: CheckpointConfig
    divergence: DivergenceConfig
    state_at: Callable[[Checkpointer, int], State]
    batches: Callable[[Iterable[int]], Generator[Batch, None, None]]
    put: Callable[[Batch], Batch]
    step: Callable[[State, Batch], tuple[State, Metrics]]
    evaluate: Callable[[State, int], dict[str, float]]
    show: Callable[[State, int], Any]
    meta: Mapping[str, Any]
    check: Callable[[int, Mapping[str, Any]], None]
    begin: Callable[[], None]
    meter: Callable[[], Meter]


def train(
    make: Callable[[], Task], run: RunFolder, mesh: Mesh, checkpoint: CheckpointConfig, profile: int | None
) -> tuple[State, Any] | None:
    """Train until the last step, or until SIGTERM or Ctrl-C, which save and return.

    With several processes each calls this, and a signal to one stops all. The first writes the run's folder,
    which all of them see.

    Args:
        make: makes the task, under the mesh.
        profile: the first of three steps to trace into the run's `profile/`.

    Returns:
        The final state and what `Task.show` last returned; None of a run that was stopped.

    Raises:
        UserError: for anything in the data or the run folder that the user can mend.
    """
    # Signals are minded until the last save, which the checkpointer waits for, is on the disk.
    with jax.set_mesh(mesh), Stop() as stop, Checkpointer(run.checkpoints, checkpoint.keep) as checkpointer:
        task = make()
        state = first_state(task, checkpointer)
        start = int(state.step)
        if profile is not None and not start < profile <= task.steps:
            raise UserError(
                f"--profile {profile}: the steps to do are those after {start} up to {task.steps}"
            )
        on_first(task.begin)
        stopping = AnyProcess(lambda: stop.signal is not None, mesh)
        state, outcome = _run_steps(task, state, checkpointer, stopping, profile)
        while isinstance(outcome, Alarm):
            del state  # or the device would hold two of them
            state = _rewind(task, outcome, checkpointer)
            state, outcome = _run_steps(task, state, checkpointer, stopping, profile)
    done = int(state.step)
    if done == task.steps:
        return state, outcome
    reason = stop.signal or "another process is told to stop"
    _log.info("%s: saved step %d in %s; go on with --resume", reason, done, run.path)
    if stop.signal is None:
        sys.exit(LOST_PEER)  # so that a supervisor knows that this one could go on
    return None


def first_state(task: Task, checkpointer: Checkpointer) -> State:
    """The newest intact checkpoint's state; without one, that of step 0.

    A checkpoint of step 0 holds the weights that the run was imported with, and was trained on nothing here.

    Raises:
        UserError: if the checkpoint can't be gone on from, or passed over batches that the run's record
            doesn't name.
    """
    step = checkpointer.newest_intact()
    if step == 0:
        _log.info("starting from the imported weights in %s", checkpointer.folder / "0")
    elif step is not None:
        meta = checkpointer.read_meta(step)
        task.check(step, meta)
        _require_record(step, meta, task.run)
        _log.info("resuming from step %d", step)
    return task.state_at(checkpointer, step or 0)


def _require_record(step: int, meta: Mapping[str, Any], run: RunFolder) -> None:
    recorded = [rewind.skipped for rewind in read_rewinds(run.rewinds)]
    passed_over = [tuple(span) for span in meta["data"]["skipped"]]
    if merged([*recorded, *passed_over]) != merged(recorded):
        raise UserError(
            f"checkpoint {step} has passed over batches that {run.rewinds} doesn't name: bring that file "
            "back, or later batches would be others than before"
        )


def _run_steps(
    task: Task, state: State, checkpointer: Checkpointer, stopping: AnyProcess, profile: int | None
) -> tuple[State, Any]:
    """The state after the last step and what was last shown; or the alarm of what went wrong before it."""
    run, steps, start = task.run, task.steps, int(state.step)
    skipped = [rewind.skipped for rewind in read_rewinds(run.rewinds)]
    batches = task.batches(batch_of(step, skipped) for step in range(start, steps))
    meter = task.meter()
    shown = task.show(state, start) if start == steps else None  # of a run that is done already
    with (
        contextlib.closing(batches),
        MetricsWriter(run, start) as writer,
        progress("training", steps, start) as update,
        contextlib.ExitStack() as tracing,
    ):
        monitor = _monitor(task)
        for step in range(start + 1, steps + 1):
            with meter.lap("data"):
                batch = task.put(next(batches))
            _profile(tracing, run, profile, step)
            state, metrics = task.step(state, batch)
            stopping.ask()
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            values |= meter.measure(step)
            alarm = monitor.observe(step, values)
            if alarm is None and _is_due(task.eval_every, step, steps):
                with meter.lap("evaluation"):
                    figures = task.evaluate(state, step)
                    values |= figures
                    if step < steps:  # the last evaluation is of more data, and its figures of their own
                        alarm = monitor.observe_evaluation(step, figures)
                    if alarm is None:
                        shown = task.show(state, step)
            writer.write(step, values)  # before the checkpoint that stands for having done this step
            if alarm is not None:
                return state, alarm
            rate = values[f"{meter.unit}_per_second"]
            update(step, f"loss {values['loss']:.3f}  {rate:,.0f} {meter.unit}/s")
            last = stopping.answer()
            if last or _is_due(task.checkpoint.every, step, steps):
                with meter.lap("checkpoint"):
                    _save(task, state, step, skipped, monitor.good, checkpointer)
            if last:
                break
    return state, shown


def _is_due(every: int, step: int, last: int) -> bool:
    """Whether what happens each `every` steps and at the last one (0: at that one only) happens now."""
    return step == last or (every > 0 and step % every == 0)


def _monitor(task: Task) -> Monitor:
    """A monitor that has seen what the run's metrics hold."""
    monitor = Monitor(task.divergence)
    for line in read_metrics(task.run.metrics):
        monitor.observe(int(line["step"]), line)
        if task.divergence.watch.keys() <= line.keys() and line["step"] < task.steps:
            monitor.observe_evaluation(int(line["step"]), line)
    return monitor


def _rewind(task: Task, alarm: Alarm, checkpointer: Checkpointer) -> State:
    """The state to go on from after `alarm`; what was skipped and why is in the run's record."""
    checkpointer.wait()
    rewind = rewind_of(on_first(lambda: _plan(task, alarm, checkpointer)))
    # In this order: whatever a kill comes between, a resumed run goes on before the bad batches.
    checkpointer.discard_after(rewind.restored)
    on_first(lambda: append_rewind(task.run.rewinds, rewind))
    _log.warning(
        "step %d: %s; back to step %d, past batches %d to %d (%s)",
        alarm.step, alarm.reason, rewind.restored, rewind.skipped[0], rewind.skipped[1] - 1,
        task.run.rewinds,
    )  # fmt: skip
    return task.state_at(checkpointer, rewind.restored)


def _plan(task: Task, alarm: Alarm, checkpointer: Checkpointer) -> dict[str, Any]:
    """Where to go back to, and what is lost by it."""
    before = read_rewinds(task.run.rewinds)
    rewind = plan(alarm, before, checkpointer.intact_steps(), task.divergence)
    lost = [line["loss"] for line in read_metrics(task.run.metrics) if line["step"] > rewind.restored]
    return rewind._replace(lost_loss=[plain(loss) for loss in lost])._asdict()


def _save(
    task: Task, state: State, step: int, skipped: Sequence[Span], good: int, checkpointer: Checkpointer
) -> None:
    """Save, and keep what a divergence that only begins to show would go back to."""
    data = {"next_step": batch_of(step, skipped), "skipped": merged(skipped)}
    meta = {**task.meta, "data": data}
    checkpointer.save(step, *split(state), meta, hold=(good - task.divergence.skip, good))


def _profile(tracing: contextlib.ExitStack, run: RunFolder, first: int | None, step: int) -> None:
    """Trace three steps, fewer where the run ends before, to be opened in TensorBoard or Perfetto."""
    if step == first:
        folder = run.path / "profile"
        tracing.callback(_log.info, "profile from step %d on: %s", first, folder)
        tracing.enter_context(jax.profiler.trace(folder))
    elif first is not None and step == first + 3:
        tracing.close()
