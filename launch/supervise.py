"""`python -m launch.supervise --config FILE --processes N`: train with several processes, past their deaths.

Starts `llm.train` once a process, on this machine, or with `--hosts` once a host through Slurm's `srun`. When
one dies it says which and how, ends the others, which would wait for it, and goes on from the last checkpoint
on those that are left, on the largest mesh that fits them. The global batch stays, and with it the order of
the data. A user's error (exit code 2), a failure of all at once, or too many deaths without a checkpoint
between them end the job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from core.config import add_arguments, load
from core.distributed import LOST_PEER, port
from core.errors import UserError, run_command
from core.options import MeshConfig
from core.signals import Stop
from llm.config import Experiment

USER_ERROR = 2
DEATHS = 3  # in a row without a new checkpoint
_SETTLE_SECONDS = 0.5  # after a death, for others that died with it to show
_END_SECONDS = 5.0
_LINES = 12  # of its last messages, that are told of a process that died
# How a process ends because another one did: by itself, or stopped by JAX (SIGABRT).
_CONSEQUENCES = (LOST_PEER, -signal.SIGABRT, 128 + signal.SIGABRT)


class Seat(NamedTuple):
    """Where a process runs: `host` for Slurm, None on this machine, where it is the `number`-th."""

    host: str | None
    number: int

    @property
    def name(self) -> str:
        return self.host or f"{socket.gethostname()}, process {self.number}"


@dataclass
class Child:
    """A started process, and the last it said."""

    seat: Seat
    popen: subprocess.Popen
    said: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    readers: list[threading.Thread] = field(default_factory=list)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.supervise", description=__doc__.split(": ")[1].splitlines()[0]
    )
    add_arguments(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--processes", type=int, metavar="N", help="how many, on this machine")
    where.add_argument("--hosts", metavar="A,B,...", help="one each on hosts of this Slurm job")
    parser.add_argument("--devices", type=int, required=True, metavar="D", help="devices of each process")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    if args.hosts:
        if shutil.which("srun") is None:
            raise UserError("--hosts needs Slurm, and there is no srun here: run this in a job")
        seats = [Seat(host, i) for i, host in enumerate(args.hosts.split(","))]
    else:
        seats = [Seat(None, i) for i in range(args.processes)]
    if not seats or args.devices < 1:
        raise UserError("--processes and --devices must be at least 1")
    command = [sys.executable, "-m", "llm.train", "--config", args.config]
    command += [part for override in args.overrides for part in ("--set", override)]
    with Stop() as stop:
        sys.exit(supervise(experiment, command, seats, args.devices, args.resume, stop))


def supervise(
    experiment: Experiment, command: list[str], seats: list[Seat], devices: int, resume: bool, stop: Stop
) -> int:
    """Run `command` on `seats` until it is done, and return the exit code.

    Raises:
        UserError: when the mesh doesn't fit the devices, at first or after a death.
    """
    require_fit(experiment, experiment.mesh, len(seats) * devices)
    mesh, left, deaths, reached = experiment.mesh, seats, 0, _newest_checkpoint(experiment)
    attempt = 0
    while True:
        arguments = ["--resume"] * resume
        for axis, size in mesh.sizes(len(seats) * devices).items():
            arguments += ["--set", f"mesh.{axis}={size}"]
        children = _start([*command, *arguments], seats, devices, attempt)
        dead = _watch(children, stop)
        codes = [child.popen.returncode for child in children]
        if not dead:
            return 0
        if USER_ERROR in codes:
            return USER_ERROR
        if stop.signal is not None:
            return 0 if set(codes) <= {0, LOST_PEER} else 1
        for child in dead:
            _say(_obituary(child))
        if len(dead) == len(children) > 1:
            _say("all processes ended so: the program's doing, or the machines' common one; giving up")
            return 1
        step = _newest_checkpoint(experiment)
        deaths = 1 if step != reached else deaths + 1
        if deaths >= DEATHS:
            _say(f"{deaths} deaths without a new checkpoint: giving up")
            return 1
        lost = {child.seat for child in dead}
        left = [seat for seat in left if seat not in lost]
        seats, mesh = refit(experiment, left, devices)
        reached, resume, attempt = step, True, attempt + 1
        sizes = mesh.sizes(len(seats) * devices).items()
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes if size != 1) or "of one device"
        where = "the start" if step is None else f"step {step}"
        spare = f"; {len(left) - len(seats)} more are left, but fit no mesh" if left != seats else ""
        _say(f"going on from {where} with {len(seats)} process(es) of {devices} devices: mesh {shape}{spare}")


def refit(experiment: Experiment, seats: list[Seat], devices: int) -> tuple[list[Seat], MeshConfig]:
    """As many of `seats`, `devices` each, as a mesh fits on, and the mesh.

    `tensor`, `context` and `expert` stay as they are: they decide what a device holds of a layer. `fsdp`
    stays or shrinks as little as can be, since it decides what a device holds of the state, and `data` takes
    the rest.

    Raises:
        UserError: when nothing fits.
    """
    asked = experiment.mesh
    for count in range(len(seats), 0, -1):
        total = count * devices
        inner = asked.tensor * asked.context * asked.expert
        if min(asked.tensor, asked.context, asked.expert) < 1 or total % inner:
            continue
        most = total // inner if asked.fsdp == -1 else min(asked.fsdp, total // inner)
        for fsdp in range(most, 0, -1):
            if (total // inner) % fsdp:
                continue
            mesh = MeshConfig(total // inner // fsdp, fsdp, asked.tensor, asked.context, asked.expert)
            try:
                require_fit(experiment, mesh, total)
            except UserError:
                continue
            return seats[:count], mesh
    fixed = ", ".join(f"mesh.{axis}={getattr(asked, axis)}" for axis in ("tensor", "context", "expert"))
    raise UserError(
        f"no mesh fits on what is left, {len(seats)} process(es) of {devices} devices, with {fixed} and "
        f"data.batch_size {experiment.data.batch_size}: mend a machine and go on with --resume, or choose "
        "another mesh with --set mesh.AXIS=..."
    )


def require_fit(experiment: Experiment, mesh: MeshConfig, devices: int) -> None:
    """Raise a `UserError` unless `mesh` has that many devices, and the experiment divides over it."""
    sizes = mesh.sizes(devices)
    from jax.sharding import AbstractMesh  # only now: mistakes before this answer at once

    from llm.setup import check_mesh

    check_mesh(experiment, AbstractMesh(tuple(sizes.values()), tuple(sizes)))


def _start(command: Sequence[str], seats: Sequence[Seat], devices: int, attempt: int) -> list[Child]:
    """One process a seat; its input is a pipe, whose end makes it end."""
    if seats[0].host is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    else:  # another port than the job before had, which may not be free yet
        address = f"{seats[0].host}:{port(os.environ.get('SLURM_JOB_ID', '0'), attempt)}"
    children = []
    for process, seat in enumerate(seats):
        job = {"T2T_COORDINATOR": address, "T2T_PROCESSES": str(len(seats)), "T2T_PROCESS": str(process)}
        environment = {**os.environ, **job, "T2T_SUPERVISED": "1"}
        if seat.host is None:
            environment |= _share_of_devices(seat.number, devices, os.environ)
            line = list(command)
        else:
            line = [
                "srun",
                "--nodes=1",
                "--ntasks=1",
                f"--nodelist={seat.host}",
                f"--gpus-per-node={devices}",
            ]
            line += ["--unbuffered", *command]
        # A session of its own, so that Ctrl-C reaches this process alone, which passes it on.
        popen = subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        child = Child(seat, popen)
        for source, target, keep in (
            (popen.stdout, sys.stdout, None),
            (popen.stderr, sys.stderr, child.said),
        ):
            thread = threading.Thread(target=_pass_on, args=(source, target, keep), daemon=True)
            thread.start()
            child.readers.append(thread)
        children.append(child)
    return children


def _share_of_devices(number: int, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What shows a process on this machine its own GPUs, or gives it CPU devices where there are none."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(i) for i in range((number + 1) * devices)]
    mine = ids[number * devices : (number + 1) * devices]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine), "JAX_NUM_CPU_DEVICES": str(devices)}


def _pass_on(source: IO[str], target: IO[str], keep: deque[str] | None) -> None:
    for line in source:
        if "Expected number of connected peer ranks" in line:  # a greeting of Gloo's
            continue
        if keep is not None:
            keep.append(line.rstrip())
        target.write(line)
        target.flush()


def _watch(children: list[Child], stop: Stop) -> list[Child]:
    """Wait until all have ended well, or one badly: then end all, and return those it began with."""
    told = False
    while True:
        if stop.signal is not None and not told:
            _say(f"{stop.signal}: telling the processes to save and stop")
            told = True
            for child in children:
                child.popen.send_signal(signal.SIGTERM)
        codes = [child.popen.poll() for child in children]
        if any(codes):
            break
        if all(code == 0 for code in codes):
            return []
        time.sleep(0.05)
    time.sleep(_SETTLE_SECONDS)
    dead = [child for child in children if child.popen.poll()]
    stopped = [child for child in children if child.popen.poll() == 0]  # told to, alone
    for child in children:
        child.popen.stdin.close()  # type: ignore[union-attr]
    stop_waiting = time.monotonic() + _END_SECONDS
    for child in children:
        try:
            child.popen.wait(max(0.0, stop_waiting - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.popen.kill()
            child.popen.wait()
        for reader in child.readers:
            reader.join(1.0)
    causes = [child for child in dead if child.popen.returncode not in _CONSEQUENCES]
    return causes or stopped or dead[:1]


def _obituary(child: Child) -> str:
    code = child.popen.returncode
    if code == 0:
        return f"{child.seat.name} was told to stop"
    number = -code if code < 0 else code - 128
    if number in {int(s) for s in signal.Signals}:
        how = f"was killed by {signal.Signals(number).name}"
    else:
        how = f"ended with exit code {code}"
    last = "".join(f"\n    | {line}" for line in child.said)
    return f"{child.seat.name} {how}" + (f"; the last it said:{last}" if last else "")


def _newest_checkpoint(experiment: Experiment) -> int | None:
    folder = experiment.run.folder / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _say(message: str) -> None:
    print(f"supervisor: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main, again="run the same command with --resume")
