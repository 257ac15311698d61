"""The batch script: options that sbatch has, a shell that reads it, and its job, on hosts played here."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys

import pytest
from processes import DEVICES, ROOT, environment
from test_supervise import STEPS, pid_of, wait_for_checkpoint
from tiny import copy_corpus, experiment

from core.config import to_yaml
from core.distributed import Place as ProcessPlace
from core.distributed import find_place, first_host
from core.errors import UserError
from core.metrics import read_metrics
from launch.slurm import render

# Of sbatch's manual page: those of its options that take a value and could stand here, and flags.
VALUED = {
    *(
        "account",
        "constraint",
        "error",
        "gpus",
        "gpus-per-node",
        "gres",
        "job-name",
        "mem",
        "nodes",
        "ntasks",
    ),
    *("ntasks", "ntasks-per-node", "output", "partition", "qos", "signal", "time"),
}
FLAGS = {"exclusive", "no-kill", "no-requeue", "requeue", "wait"}


def test_the_script_is_what_sbatch_and_bash_read(tmp_path):
    settings = experiment(tmp_path, tmp_path, "a run's $(name)", mesh={"data": 4, "fsdp": 2})
    overrides = ["run.name=a run's $(name)", "eval.prompts=['\"x\" `y`']"]
    script = render(settings, "dir with space/c.yaml", overrides, 2, 4, "1-00:00:00")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert set(options) <= VALUED | FLAGS
    assert all((name in FLAGS) == (value == "") for name, value in options.items())
    assert re.fullmatch(r"[\w.-]+", options["job-name"])
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "4")
    assert options["time"] == "1-00:00:00"
    assert lines.index("set -euo pipefail") > max(i for i, line in enumerate(lines) if "#SBATCH" in line)
    words = shlex.split(lines[-1])
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set"] == overrides
    assert words[words.index("--config") + 1] == "dir with space/c.yaml"


def test_a_mesh_of_another_size_and_a_wrong_time_are_refused(tmp_path):
    settings = experiment(tmp_path, tmp_path, mesh={"data": 4})
    with pytest.raises(UserError, match=r"mesh\.data=4 does not match the 8 planned"):
        render(settings, "c.yaml", [], 2, 4, None)
    with pytest.raises(UserError, match="--time 'soon'"):
        render(settings, "c.yaml", [], 1, 4, "soon")


def test_a_step_of_several_tasks_is_a_job():
    step = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_STEP_NODELIST": "gpu[007-009,012],login1",
    }
    assert find_place(step) == ProcessPlace("gpu007:61441", 4, 3)
    assert find_place(step | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # no step
    assert [first_host(x) for x in ("a1", "a1,b2", "a[1,3]", "n[01-04]")] == ["a1", "a1", "a1", "n01"]
    job = {"T2T_COORDINATOR": "h:1", "T2T_PROCESSES": "2"}
    assert find_place(step | job | {"T2T_PROCESS": "1"}) == ProcessPlace("h:1", 2, 1)
    assert find_place(job | {"JOB_COMPLETION_INDEX": "0"}) == ProcessPlace("h:1", 2, 0)
    for wrong in ({}, {"T2T_PROCESS": "2"}, {"T2T_PROCESS": "x"}):
        with pytest.raises(UserError, match="set T2T_PROCESSES"):
            find_place(job | wrong)
    with pytest.raises(UserError, match="host:port"):
        find_place(job | {"T2T_COORDINATOR": "h"})


SRUN = """#!{python}
import os, sys
hosts = [a.partition("=")[2] for a in sys.argv if a.startswith("--nodelist=")]
assert hosts[0] in ("localhost", "ip6-localhost") or hosts[0].startswith("node"), hosts
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
os.environ["T2T_COORDINATOR"] = "127.0.0.1:" + os.environ["T2T_COORDINATOR"].rpartition(":")[2]
os.execvp(command[0], command)
"""


@pytest.mark.slow
def test_the_script_runs_and_goes_on_without_a_host(tmp_path):
    """The real script, its supervisor and its processes; only `srun` and `scontrol` are played."""
    (tmp_path / "corpus").mkdir()
    copy_corpus(tmp_path / "corpus")
    config = tmp_path / "slurm.yaml"
    settings = experiment(tmp_path / "corpus", tmp_path, "slurm", mesh={"data": -1, "fsdp": 2}, **STEPS)
    config.write_text(to_yaml(settings))
    tools = tmp_path / "bin"
    tools.mkdir()
    scontrol = "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", scontrol)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    script = render(settings, str(config), [], 2, DEVICES, None)
    job = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(
            tmp_path / "compiled", PATH=f"{tools}:{os.environ['PATH']}",
            SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="123",
        ),
    )  # fmt: skip
    wait_for_checkpoint(tmp_path / "slurm", job)
    os.kill(pid_of(1, job.pid), signal.SIGKILL)
    _, said = job.communicate(timeout=150)
    assert job.returncode == 0, said
    assert "supervisor: node2 was killed by SIGKILL" in said and "mesh data 2 x fsdp 2" in said
    steps = [line["step"] for line in read_metrics(tmp_path / "slurm" / "metrics.jsonl")]
    assert steps == list(range(1, 61))
