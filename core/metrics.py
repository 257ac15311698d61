"""Figures of a run by step, in `metrics.jsonl` and for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from core.distributed import is_first, on_first
from core.files import write_atomically
from core.run import RunFolder, plain

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends to `metrics.jsonl`, one flat JSON object a step, and shows the same to TensorBoard.

    What is written is in the file when `write` returns, and survives a SIGKILL. To write a step before its
    checkpoint is what makes the file of a resumed run whole. With several processes each has a writer, and
    the first one's writes.
    """

    def __init__(self, run: RunFolder, start_step: int = 0):
        """Open the files of `run`; lines past `start_step`, where the run goes on from, are removed."""
        on_first(lambda: _remove_after(run.metrics, start_step))
        self._files: tuple[IO[bytes], _Events] | None = None
        if is_first():
            self._last = max((record["step"] for _, record in _lines(run.metrics)), default=-1)
            self._files = open(run.metrics, "ab"), _Events(run.tensorboard, start_step)  # noqa: SIM115

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write `values`, name to number, for `step`, which must be after the last one written.

        A value that isn't finite stands as null in the file, since JSON has neither NaN nor infinities, and
        as what it is in TensorBoard. Raises `OSError` with the file's name, on a full disk for example.
        """
        if self._files is None:
            return
        if step <= self._last:
            raise ValueError(f"step {step} after step {self._last}")
        self._last = step
        file, events = self._files
        record = {"step": step} | {name: plain(value) for name, value in values.items()}
        with _naming(file):
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
        events.write(step, values)

    def close(self) -> None:
        for file in self._files or ():
            with contextlib.suppress(OSError):  # each write flushes, so what fails here was told by `write`
                file.close()


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """The lines of a `metrics.jsonl`, also of a run that is going on; null becomes NaN."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in _lines(path)
    ]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Bytes and content of each line, less a torn last one; a damaged one is named and left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                damaged = not isinstance(record["step"], int)
            except (ValueError, TypeError, KeyError):
                damaged = True
            if not damaged and line.endswith(b"\n"):
                yield line, record
            elif line.endswith(b"\n"):
                _log.warning("%s, line %d is damaged and left out", path, number)


def _remove_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`, in one step that a kill can't split."""
    if not path.exists():
        return
    write_atomically(path, b"".join(line for line, record in _lines(path) if record["step"] <= step))


@contextlib.contextmanager
def _naming(file: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = file.name
        raise


class _Events:
    """TensorBoard's event files: one a start, named so that they are read in the order of writing.

    Written through the record writer of the `tensorboard` package rather than its `EventFileWriter`, whose
    thread would print a traceback on a full disk instead of raising here.
    """

    def __init__(self, folder: Path, start_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        numbers = [path.suffix[1:] for path in folder.glob("events.out.tfevents.*")]
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        name = f"events.out.tfevents.{last + 1:06d}"
        self._file = open(folder / name, "xb")  # noqa: SIM115
        self._writer = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # Makes TensorBoard forget what an earlier start wrote past the step that this one goes on from.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=start_step + 1, session_log=session)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=float(v)) for name, v in values.items()]
        self._add(step=step, summary=self._summary(value=scalars))

    def _add(self, **fields: Any) -> None:
        with _naming(self._file):
            self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
