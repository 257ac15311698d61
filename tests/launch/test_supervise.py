"""A job goes on without those of its processes that die, from the last checkpoint, and says which died."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from processes import DEVICES, ROOT, environment
from tiny import copy_corpus, experiment

from core.checkpoint import Checkpointer
from core.config import load, to_yaml
from core.errors import UserError
from core.metrics import read_metrics
from launch.supervise import Seat, refit
from llm.config import Experiment
from llm.loop import train

STEPS = {"train": {"steps": 60, "attention": "reference"}, "checkpoint": {"every": 5}, "eval": {"every": 0}}
HEADS = {"num_kv_heads": 2}  # that tensor may divide


def seats(count: int) -> list[Seat]:
    return [Seat(None, i) for i in range(count)]


@pytest.mark.parametrize(
    ("mesh", "left", "devices", "used", "expected"),
    [
        ({"data": 8}, 1, 4, 1, {"data": 4}),
        ({"data": -1, "fsdp": 2}, 1, 4, 1, {"data": 2, "fsdp": 2}),
        ({"data": 1, "fsdp": 8}, 1, 4, 1, {"fsdp": 4}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 4, 1, {"fsdp": 2, "tensor": 2}),
        ({"data": 1, "fsdp": -1}, 3, 2, 2, {"fsdp": 4}),  # 8 rows do not divide over 6 devices
        ({"data": 4, "fsdp": 2}, 3, 2, 2, {"data": 2, "fsdp": 2}),
        ({"data": 2, "context": 4}, 1, 4, 1, {"data": 1, "context": 4}),
    ],
)
def test_the_largest_mesh_that_fits_is_found(mesh, left, devices, used, expected, tmp_path):
    kept, new = refit(experiment(tmp_path, tmp_path, mesh=mesh, model=HEADS), seats(left), devices)
    assert kept == seats(used)
    assert {k: v for k, v in new.sizes(used * devices).items() if v != 1} == {
        k: v for k, v in expected.items() if v != 1
    }


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no mesh fits .* 1 process\(es\) of 1 devices, with mesh\.tensor=2"):
        refit(experiment(tmp_path, tmp_path, mesh={"data": 4, "tensor": 2}, model=HEADS), seats(1), 1)
    with pytest.raises(UserError, match=r"no mesh fits on what is left, 0 process"):
        refit(experiment(tmp_path, tmp_path), [], 4)


class Place(NamedTuple):
    """What the tests share: one corpus, its cache, and the losses of a run that nothing disturbs."""

    folder: Path
    losses: list[float]

    def config(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        mesh = {"data": -1, "fsdp": 2}
        path.write_text(to_yaml(experiment(self.folder / "corpus", self.folder, name, mesh=mesh, **STEPS)))
        return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("supervise")
    (folder / "corpus").mkdir()
    copy_corpus(folder / "corpus")
    train(load(Experiment, Place(folder, []).config("calm")))
    return Place(folder, [line["loss"] for line in read_metrics(folder / "calm" / "metrics.jsonl")])


def start(command: list[str], place: Place, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(place.folder / "compiled", **more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def supervisor(config: Path) -> list[str]:
    command = [sys.executable, "-m", "launch.supervise", "--config", str(config)]
    return [*command, "--processes", "2", "--devices", str(DEVICES)]


def wait_for_checkpoint(run: Path, job: subprocess.Popen) -> None:
    checkpointer, until = Checkpointer(run / "checkpoints"), time.monotonic() + 120
    while checkpointer.latest_step() is None and job.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


def pid_of(process: int, supervisor: int) -> int:
    """The process of that number among those below the supervisor."""
    below = {supervisor}
    for _ in range(3):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status, variables = (folder / "stat").read_text(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) in below:
                below.add(int(folder.name))
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if f"T2T_PROCESS={process}".encode() in variables.split(b"\0") and b"llm.train" in command:
                    return int(folder.name)
    raise AssertionError(f"no process {process}")


def assert_goes_on_as_if_calm(place: Place, name: str) -> None:
    metrics = read_metrics(place.folder / name / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 61))
    np.testing.assert_allclose([line["loss"] for line in metrics], place.losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("victim", "sent", "told"),
    [
        (1, signal.SIGKILL, "was killed by SIGKILL"),
        pytest.param(0, signal.SIGKILL, "was killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param(
            1, signal.SIGTERM, "was told to stop", marks=pytest.mark.slow
        ),  # as when a node is drained
    ],
)
def test_a_process_that_ends_is_named_and_the_other_goes_on(victim, sent, told, place):
    name = f"{sent.name}-{victim}"
    job = start(supervisor(place.config(name)), place)
    wait_for_checkpoint(place.folder / name, job)
    killed = time.monotonic()
    os.kill(pid_of(victim, job.pid), sent)
    _, said = job.communicate(timeout=150)
    assert job.returncode == 0, said
    assert f"supervisor: {socket.gethostname()}, process {victim} {told}" in said
    assert "with 1 process(es) of 4 devices: mesh data 2 x fsdp 2" in said
    assert time.monotonic() - killed < 60  # no timeout of a minute or more was waited for
    assert_goes_on_as_if_calm(place, name)


def test_a_user_error_is_not_tried_again(place):
    job = start([*supervisor(place.config("calm")), "--set", "data.sources=[/nowhere/*.txt]"], place)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 2 and said.count("error: ") == 1 and "going on" not in said, said


@pytest.mark.slow
def test_a_signal_reaches_all_and_the_job_is_taken_up_again(place):
    job = start(supervisor(place.config("stopped")), place)
    wait_for_checkpoint(place.folder / "stopped", job)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and "saved step" in said, said
    _, said = start([*supervisor(place.config("stopped")), "--resume"], place).communicate(timeout=150)
    assert "resuming from step" in said
    assert_goes_on_as_if_calm(place, "stopped")


def test_deaths_without_progress_end_the_job(place, tmp_path):
    """A program that dies at once, as with a broken driver, isn't started for ever."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'llm.train' in sys.orig_argv and os.environ['T2T_PROCESS'] == '0':\n"
        "    print('no driver', file=sys.stderr, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = supervisor(place.config("hopeless"))
    command[command.index("--processes") + 1] = "8"
    command[command.index("--devices") + 1] = "1"
    _, said = start(command, place, PYTHONPATH=str(tmp_path)).communicate(timeout=120)
    assert said.count("process 0 was killed by SIGKILL; the last it said:\n    | no driver") == 1
    assert said.count("was killed by SIGKILL") == 3 and "3 deaths without a new checkpoint" in said


def test_what_fails_everywhere_is_not_blamed_on_machines(place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'llm.train' in sys.orig_argv:\n"
        "    os.write(2, b'no such driver\\n')\n"
        "    os._exit(1)\n"
    )
    job = start(supervisor(place.config("broken")), place, PYTHONPATH=str(tmp_path))
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1 and "all processes ended so" in said and "going on" not in said, said
    assert said.count("ended with exit code 1; the last it said:") == 2 and "| no such driver" in said
