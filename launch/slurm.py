"""`python -m launch.slurm --config FILE --nodes N --gpus-per-node G`: a batch script for Slurm.

It is printed, or with `--submit` handed to `sbatch`. The job runs `launch.supervise` on its first node, which
starts one process a node and goes on without nodes that fail. The checkout, the environment and the run's
folder are on a file system that all nodes see.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import add_arguments, load
from core.errors import UserError, run_command
from launch.supervise import require_fit
from llm.config import Experiment

STOP_SECONDS = 300  # before the time limit, to save


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    parser.add_argument("--time", metavar="LIMIT", help="as for sbatch; default: the partition's")
    parser.add_argument("--submit", action="store_true", help="hand it to sbatch instead of printing it")
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    script = render(experiment, args.config, args.overrides, args.nodes, args.gpus_per_node, args.time)
    if not args.submit:
        print(script, end="")
        return
    try:
        done = subprocess.run(["sbatch"], input=script, text=True)
    except FileNotFoundError:
        raise UserError("there is no sbatch here: run this on a machine of the cluster") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job (exit code {done.returncode}), see above")


def render(
    experiment: Experiment, config: str, overrides: Sequence[str], nodes: int, gpus: int, time: str | None
) -> str:
    """The batch script.

    Raises:
        UserError: when the mesh doesn't fit nodes x GPUs, or `time` is no time limit.
    """
    require_fit(experiment, experiment.mesh, nodes * gpus)
    if time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(f"--time {time!r}: give minutes, HH:MM:SS or D-HH:MM:SS")
    options = {
        "job-name": re.sub(r"[^\w.-]", "-", experiment.run.name),
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(gpus),
        "exclusive": None,
        "no-kill": None,  # when a node fails, the others go on
        "time": time,
        "signal": f"B:TERM@{STOP_SECONDS}",
        "output": "%x-%j.log",
    }
    lines = [f"--{k}" if v is None else f"--{k}={v}" for k, v in options.items() if (k, v) != ("time", None)]
    command = [sys.executable, "-m", "launch.supervise", "--config", config, "--devices", str(gpus)]
    command += [part for override in overrides for part in ("--set", override)] + ["--resume"]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)',
            "# In place of this shell, so that the signal before the time limit reaches it.",
            f'exec {shlex.join(command)} --hosts "$hosts"',
            "",
        ]
    )


if __name__ == "__main__":
    run_command(main)
