"""Run folders: begun once, resumed only with their own configuration, by one process; signals that stop."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from core import files
from core.errors import UserError
from core.run import RunFolder
from core.signals import Stop

ROOT = Path(__file__).parents[2]

CONFIG = """\
run: {name: first, dir: runs}
model: {num_layers: 4, rope_scaling: null}
train: {steps: 100}
mesh: {data: -1}
eval: {every: 0}
checkpoint: {every: 500}
"""


def begin(folder: Path) -> RunFolder:
    run = RunFolder.create(folder, CONFIG)
    run.metrics.write_text('{"step": 1}\n')
    return run


def test_a_new_run_holds_its_configuration_and_environment(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "first", CONFIG)
    assert run.config.read_text() == CONFIG
    (start,) = json.loads(run.environment.read_text())
    assert set(start["packages"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert start["packages"]["numpy"] == np.__version__
    assert start["command"] == shlex.join(sys.orig_argv) and start["python"].startswith("3.")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert start["git_commit"] == head.stdout.strip() and isinstance(start["git_dirty"], bool)


def test_a_folder_that_holds_a_run_is_an_error_without_resume(tmp_path):
    begin(tmp_path / "r")
    with pytest.raises(UserError, match=r"r already holds a run: .*--resume.*run\.name=.*delete"):
        RunFolder.create(tmp_path / "r", CONFIG)


def test_checkpoints_alone_are_a_run(tmp_path):
    run = RunFolder.create(tmp_path / "r", CONFIG)
    (run.checkpoints / "10").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.create(tmp_path / "r", CONFIG)


def test_what_stopped_before_its_first_step_begins_anew(tmp_path):
    RunFolder.create(tmp_path / "r", CONFIG)
    other = CONFIG.replace("num_layers: 4", "num_layers: 8")
    assert RunFolder.create(tmp_path / "r", other).config.read_text() == other


def test_resume_without_a_run_begins_one_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert RunFolder.create(tmp_path / "r", CONFIG, resume=True).config.read_text() == CONFIG
    assert f"{tmp_path / 'r'} holds no run to go on with: one begins" in caplog.text


def test_resume_adds_a_start_and_saves_the_configuration(tmp_path):
    begin(tmp_path / "r")
    moved = (
        CONFIG.replace("dir: runs", "dir: elsewhere")
        .replace("data: -1", "data: 8")
        .replace("eval: {every: 0}", "eval: {every: 5, prompts: [a]}")
        .replace("every: 500", "every: 50")
    )
    run = RunFolder.create(tmp_path / "r", moved, resume=True)
    assert run.config.read_text() == moved
    assert len(json.loads(run.environment.read_text())) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers: 4", "num_layers: 8", "'model.num_layers' is 4 there and 8 now; resume it with"),
        ("steps: 100", "steps: 200", "'train.steps' is 100 there and 200 now"),
        ("steps: 100", "steps: 100, dtype: bfloat16", "'train.dtype' is absent there and 'bfloat16' now"),
        ("rope_scaling: null", "rope_scaling: {kind: yarn}", "'model.rope_scaling.kind' is absent there and"),
        ("{num_layers: 4, ", "{", "'model.num_layers' is 4 there and absent now"),
        (
            "4, rope_scaling: null}\ntrain: {steps: 100",
            "5, rope_scaling: 1}\ntrain: {steps: 5",
            "and 2 more differ",
        ),
    ],
)
def test_resume_with_another_configuration_names_the_key(tmp_path, old, new, message):
    run = begin(tmp_path / "r")
    with pytest.raises(UserError, match=message):
        RunFolder.create(tmp_path / "r", CONFIG.replace(old, new), resume=True)
    assert run.config.read_text() == CONFIG


@pytest.mark.parametrize("content", [b"", b"a: [", b"just text", b"\xff\xfe"])
def test_a_damaged_saved_configuration_is_an_error(tmp_path, content):
    run = begin(tmp_path / "r")
    run.config.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged: put back"):
        RunFolder.create(tmp_path / "r", CONFIG, resume=True)


def test_a_damaged_environment_does_not_stop_a_run(tmp_path):
    run = begin(tmp_path / "r")
    run.environment.write_text("[{")
    RunFolder.create(tmp_path / "r", CONFIG, resume=True)
    assert len(json.loads(run.environment.read_text())) == 1


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds no run .* such as thesis\.tex: choose another"):
            RunFolder.create(tmp_path, CONFIG, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("x")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "first"):
        with pytest.raises(UserError, match=r"can't be written: .*; choose another with --set run\.dir"):
            RunFolder.create(folder, CONFIG)


def test_a_second_process_in_the_same_run_is_an_error(tmp_path):
    script = """
        import sys
        from pathlib import Path
        from core.run import RunFolder

        RunFolder.create(Path(sys.argv[1]), sys.argv[2])
        print("begun", flush=True)
        sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "r"), CONFIG],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "begun\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid}: wait for it, or stop it"):
            RunFolder.create(tmp_path / "r", CONFIG, resume=True)
        child.kill()
    RunFolder.create(tmp_path / "r", CONFIG, resume=True)  # the lock ended with its process


def test_opening_what_is_no_run_names_the_nearest(tmp_path):
    begin(tmp_path / "quickstart")
    assert RunFolder.open(tmp_path / "quickstart").config.exists()
    with pytest.raises(UserError, match=r"quikstart holds no run .*did you mean .*/quickstart\?"):
        RunFolder.open(tmp_path / "quikstart")
    with pytest.raises(UserError, match="runs there: quickstart"):
        RunFolder.open(tmp_path / "zzz")
    with pytest.raises(UserError, match="runs there: none"):
        RunFolder.open(tmp_path / "no" / "where")


def test_the_summary_is_flat_json(tmp_path):
    run = RunFolder.create(tmp_path / "r", CONFIG)
    run.write_summary({"loss": np.float32(0.5), "corpus": "ab12", "steps": 3, "bad": math.inf})
    assert json.loads(run.summary.read_text()) == {"loss": 0.5, "corpus": "ab12", "steps": 3, "bad": None}


@pytest.mark.parametrize("content", [None, "", '{"heldout_loss": 1.', "[1, 2]", b"\xff"])
def test_a_summary_that_is_none_tells_nothing(content, tmp_path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "summary.json").write_bytes(data)
    assert RunFolder(tmp_path).read_summary() == {}


def test_nothing_here_imports_jax():
    modules = ["config", "errors", "files", "log", "metrics", "options", "plots", "run", "signals"]
    script = (
        "import sys; " + "; ".join(f"import core.{m}" for m in modules) + "; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_failed_atomic_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, "old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_atomic_writes_at_one_time_are_both_whole(tmp_path, monkeypatch):
    path, fsync = tmp_path / "file", os.fsync

    def overtake(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        files.write_atomically(path, "second")
        assert path.read_text() == "second"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", overtake)
    files.write_atomically(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_names_itself(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        wait_for(stop)
        assert stop.signal == number.name
    assert signal.getsignal(number) is before


def wait_for(stop: Stop) -> None:
    deadline = time.monotonic() + 5
    while stop.signal is None and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_signal_interrupts_at_once(first):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), first)
        wait_for(stop)
        os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert stop.signal == first.name
    assert signal.getsignal(signal.SIGINT) is before


def test_numbers_written_by_hand_are_the_same_numbers(tmp_path):
    """`1e-4` is text to YAML 1.1, and a number to whoever edits the configuration of a run."""
    RunFolder.create(tmp_path / "run", "optimizer:\n  learning_rate: 0.0001\n")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run/config.yaml").write_text("optimizer:\n  learning_rate: 1e-4\n")
    RunFolder.create(tmp_path / "run", "optimizer:\n  learning_rate: 0.0001\n", resume=True)
    with pytest.raises(UserError, match=r"'optimizer\.learning_rate' is 0\.0001 there and 0\.0002 now"):
        RunFolder.create(tmp_path / "run", "optimizer:\n  learning_rate: 0.0002\n", resume=True)


def test_where_data_is_kept_and_read_may_change(tmp_path):
    """As neither changes a batch; what is read is another matter."""
    RunFolder.create(tmp_path / "run", "data:\n  workers: 2\n  workers_of_others: 1\n")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    RunFolder.create(tmp_path / "run", "data:\n  workers: 8\n  workers_of_others: 1\n", resume=True)
    with pytest.raises(UserError, match=r"'data\.workers_of_others' is 1 there and 2 now"):
        RunFolder.create(tmp_path / "run", "data:\n  workers: 8\n  workers_of_others: 2\n", resume=True)
