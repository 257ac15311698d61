"""`metrics.jsonl` and TensorBoard: a line a step, never two, through kills and resumptions; and the plot."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.metrics import MetricsWriter, read_metrics
from core.plots import plot_loss
from core.run import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def write_steps(run: RunFolder, first: int, last: int, start: int = 0) -> None:
    with MetricsWriter(run, start) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": 1 / step, "tokens": 10 * step})


def scalars(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_each_step_is_a_flat_object_that_begins_with_its_step(run):
    values = {
        "loss": np.float32(0.1), "norm": jnp.float32(2.5), "tokens": np.int64(2**40), "rate": 3e-4, "ms": 7
    }  # fmt: skip
    with MetricsWriter(run) as writer:
        writer.write(1, values)
        text = run.metrics.read_text()  # there before the file is closed
    assert list(json.loads(text)) == ["step", *values]
    assert json.loads(text) == {
        "step": 1, "loss": float(np.float32(0.1)), "norm": 2.5, "tokens": 2**40, "rate": 3e-4, "ms": 7
    }  # fmt: skip
    assert scalars(run, "loss") == [(1, pytest.approx(0.1))]


def test_no_step_stands_twice_and_none_goes_back(run):
    with MetricsWriter(run) as writer:
        writer.write(5, {"loss": 1.0})
        for step in (4, 5):
            with pytest.raises(ValueError, match=f"step {step} after step 5"):
                writer.write(step, {"loss": 1.0})


def test_what_is_not_finite_is_null_in_json_and_itself_in_tensorboard(run):
    with MetricsWriter(run) as writer:
        writer.write(1, {"loss": float("nan"), "norm": np.float32("inf")})

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(run.metrics.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "norm": None}
    assert math.isnan(read_metrics(run.metrics)[0]["loss"])
    assert math.isnan(scalars(run, "loss")[0][1]) and scalars(run, "norm") == [(1, math.inf)]


@pytest.mark.parametrize("resume_at", [0, 1, 6, 10])
def test_after_a_resume_no_step_stands_twice(run, resume_at):
    write_steps(run, 1, 10)
    write_steps(run, resume_at + 1, 12, start=resume_at)
    expected = [{"step": s, "loss": 1 / s, "tokens": 10 * s} for s in range(1, 13)]
    assert read_metrics(run.metrics) == expected
    assert scalars(run, "loss") == [(s, pytest.approx(1 / s)) for s in range(1, 13)]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "\0\0\0\0", "{"])
def test_a_torn_last_line_is_removed(run, torn):
    write_steps(run, 1, 3)
    with open(run.metrics, "a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    write_steps(run, 4, 5, start=3)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_torn_event_file_does_not_hide_the_next(run):
    write_steps(run, 1, 5)
    (events,) = run.tensorboard.iterdir()
    os.truncate(events, events.stat().st_size - 5)
    write_steps(run, 4, 8, start=3)
    assert [step for step, _ in scalars(run, "loss")] == list(range(1, 9))


@pytest.mark.parametrize("line", ["garbage", "[1, 2]", '{"loss": 3}', '{"step": null}', "\ufffd"])
def test_a_damaged_line_is_named_and_left_out(run, caplog, line):
    write_steps(run, 1, 3)
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    assert f"{run.metrics}, line 2 is damaged" in caplog.text
    write_steps(run, 4, 4, start=3)
    caplog.clear()
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4] and not caplog.text


def test_a_kill_keeps_every_step_that_was_written(run):
    script = """
        import sys
        from pathlib import Path
        from core.metrics import MetricsWriter
        from core.run import RunFolder

        with MetricsWriter(RunFolder(Path(sys.argv[1]))) as writer:
            for step in range(1, 10**9):
                writer.write(step, {"loss": 1 / step})
                print(step, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(run.path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        for _ in range(200):
            child.stdout.readline()
        child.kill()
        written = int(["200", *child.stdout.read().split()][-1])
    assert child.returncode == -signal.SIGKILL
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows[:written]] == list(range(1, written + 1))
    assert all(row["loss"] == 1 / row["step"] for row in rows[:written])
    assert len(rows) <= written + 1
    with MetricsWriter(run, written):
        pass
    assert len(run.metrics.read_bytes().splitlines()) == written


def test_a_full_disk_is_named_and_loses_no_earlier_step(small_disk):
    run = RunFolder(small_disk)
    ballast = small_disk / "ballast"
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*'") as caught,
        MetricsWriter(run) as writer,
    ):
        writer.write(1, {"loss": 1.0})
        ballast.write_bytes(bytes(5_900_000))
        for step in range(2, 100_000):
            writer.write(step, {"loss": 1.0})
    assert caught.value.errno == errno.ENOSPC and str(small_disk) in caught.value.filename
    assert [row["step"] for row in read_metrics(run.metrics)][: step - 1] == list(range(1, step))
    ballast.unlink()
    write_steps(run, step, step + 1, start=step - 1)
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, step + 2))


def test_the_writer_needs_neither_jax_nor_tensorflow_nor_torch(run):
    script = (
        "import sys; from pathlib import Path; "
        "from core.metrics import MetricsWriter; from core.run import RunFolder; "
        "MetricsWriter(RunFolder(Path(sys.argv[1]))).write(1, {'loss': 1.0}); "
        "sys.exit(bool({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(run.path)], cwd=ROOT).returncode == 0


def test_an_empty_or_missing_file_has_no_steps(run, caplog):
    caplog.set_level(logging.WARNING)
    assert read_metrics(run.metrics) == []
    run.metrics.touch()
    assert read_metrics(run.metrics) == [] and not caplog.text


def colored(path: Path, rgb: tuple[int, int, int]) -> np.ndarray:
    """Where (height, width) the picture has about this color."""
    picture = np.asarray(Image.open(path).convert("RGB"), int)
    return np.abs(picture - np.array(rgb)).max(-1) < 12


def test_the_plot_shows_training_and_heldout_loss(tmp_path):
    rows = [{"step": s, "tokens": 100 * s, "loss": 2 + 8 / s} for s in range(1, 301)]
    rows[150]["loss"] = math.nan
    path = tmp_path / "plots" / "loss.png"
    training, heldout = (0x2A, 0x78, 0xB5), (0xD1, 0x49, 0x5B)
    plot_loss(rows, path)
    y, x = np.nonzero(colored(path, training))
    assert x.max() - x.min() > 600 and not colored(path, heldout).any()
    assert y[x < x.min() + 100].mean() < y[x > x.max() - 100].mean() - 100  # downward is to larger y
    plot_loss([*rows[:-1], rows[-1] | {"heldout_loss": 2.2}], path)
    assert colored(path, heldout).any()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "tokens": 8, "loss": 3.0}]])
def test_a_plot_of_next_to_nothing_is_drawn(tmp_path, rows):
    plot_loss(rows, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1200, 675)
