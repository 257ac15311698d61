"""A job of several processes: joining it, acting as one, and leaving it together.

Which job a process belongs to stands in its environment: `T2T_COORDINATOR` (host:port of the first
process), `T2T_PROCESSES` and `T2T_PROCESS`, as `launch.supervise` sets them; in Kubernetes the last is the
pod's `JOB_COMPLETION_INDEX` (`launch.jobset`); else what `srun` sets for a step of several tasks. Everything
here is called by every process, in the same order; with one process it costs nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from core import errors, log
from core.errors import UserError

T = TypeVar("T")
_log = logging.getLogger(__name__)

LOST_PEER = 75  # exit code of a process that ends because another one does
# A process counts as dead after HEARTBEAT_SECONDS without a sign of life; JAX's default is 100.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 300  # for all to come: nodes start apart
SHUTDOWN_SECONDS = 30
_TURN_MILLISECONDS = 24 * 3600 * 1000  # for what one process does while the others wait, such as tokenizing
_LEAVE_MILLISECONDS = 5000
_LAST_SECONDS = 2  # JAX aborts a process that finds the first one gone before it has left itself

_turns = itertools.count()
_leaving = threading.Lock()  # held by the thread that ends this process


class Place(NamedTuple):
    """A process's place in its job."""

    coordinator: str
    processes: int
    process: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that `environment` gives this process; None for one that is alone.

    Raises:
        UserError: for variables that are incomplete or make no sense.
    """
    if "T2T_COORDINATOR" in environment:
        index = environment.get("T2T_PROCESS", environment.get("JOB_COMPLETION_INDEX"))
        return _place(environment["T2T_COORDINATOR"], environment.get("T2T_PROCESSES"), index, "T2T_PROCESS")
    if {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"} <= environment.keys():
        address = f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port(environment['SLURM_JOB_ID'])}"
        count, index = environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_PROCID"]
        return _place(address, count, index, "SLURM_PROCID")
    return None


def _place(address: str, count: str | None, index: str | None, name: str) -> Place | None:
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"T2T_COORDINATOR is {address!r}: give host:port of the first process")
    if not (count and count.isdecimal() and index and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"this is process {index} of {count} of the job at {address}: set T2T_PROCESSES to how many "
            f"there are and {name} to this one's number, counted from 0"
        )
    return Place(address, int(count), int(index)) if int(count) > 1 else None


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list of hosts: `gpu[007-009,012],login1` -> `gpu007`."""
    prefix, first = re.match(r"([^,\[]*)(?:\[([^,\-\]]*))?", nodes).groups()  # type: ignore[union-attr]
    return prefix + (first or "")


def port(job: str, attempt: int = 0) -> int:
    """A port for the job of that number, above those given out to clients; another one for each attempt."""
    return 61440 + (int(re.sub(r"\D", "", job) or 0) + attempt) % 4096


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the job that this process belongs to, if any, before JAX first looks for devices.

    From here on the first process speaks for all: the others show warnings only, under their host's name. An
    error of one ends all, with one message and the same exit code.

    Raises:
        UserError: when the others can't be reached, or the environment makes no sense.
    """
    if environment.get("T2T_SUPERVISED"):
        threading.Thread(target=_end_with_supervisor, daemon=True).start()
    place = find_place(environment)
    if place is None:
        return
    if place.process:
        log.only_warnings(_name(place))
    _connect(place)
    errors.end = lambda code, message: _end(place, code, message)
    sys.excepthook = lambda kind, error, trace: _end_of_bug(place, error)
    threading.Thread(target=_end_with_others, daemon=True).start()
    _agree(place)


def _agree(place: Place) -> None:
    """Check that all mean the same job, and say who is in it."""
    client = _client()
    client.key_value_set(f"t2t/host/{place.process}", socket.gethostname())
    count = on_first(lambda: place.processes)
    if count != place.processes:
        raise UserError(
            f"T2T_PROCESSES is {place.processes} here and {count} in process 0: give all the same number"
        )
    if is_first():
        hosts = [client.blocking_key_value_get(f"t2t/host/{i}", 60_000) for i in range(count)]
        _log.info("%d processes: %s", count, ", ".join(f"{i} on {host}" for i, host in enumerate(hosts)))


def _connect(place: Place) -> None:
    import jax

    _refuse_unreachable(place)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            cluster_detection_method="deactivate",  # or Slurm's would leave each process one of its GPUs
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            f"process {place.process} of {place.processes} could not join the job at {place.coordinator}: "
            f"{reason}; start all of them, with the same T2T_COORDINATOR and T2T_PROCESSES, each with a "
            "T2T_PROCESS of its own"
        ) from None


def _refuse_unreachable(place: Place) -> None:
    """JAX ends the process when it finds no coordinator, without a chance to say what to do."""
    if place.process == 0:
        return
    host, number = place.coordinator.rsplit(":", 1)
    stop, reason = time.monotonic() + JOIN_SECONDS, ""
    while time.monotonic() < stop:
        try:
            socket.create_connection((host, int(number)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(
        f"no process 0 at {place.coordinator} within {JOIN_SECONDS} s ({reason}): start it, and check "
        "T2T_COORDINATOR and that its port can be reached from here"
    )


def is_first() -> bool:
    """Whether this process speaks and writes for the job; so does one that is alone."""
    return _state().process_id == 0


def on_first(do: Callable[[], T]) -> T:
    """What `do` returns in the first process, which alone runs it; the others wait, for hours if need be.

    That is None or what JSON can hold. A `UserError` of `do` is raised in every process.
    """
    client = _client()
    if client is None:
        return do()
    key = f"t2t/turn/{next(_turns)}"
    told: dict[str, Any]
    if is_first():
        try:
            told = {"value": do()}
        except UserError as error:
            told = {"error": str(error)}
        client.key_value_set(key, json.dumps(told))
    else:
        told = json.loads(client.blocking_key_value_get(key, _TURN_MILLISECONDS))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def first_before_others(do: Callable[[], T]) -> T:
    """`do` in every process, in the first one before the others: they find made what it makes."""
    if _client() is None:
        return do()
    done: list[T] = []
    on_first(lambda: done.append(do()))
    return done[0] if done else do()


class AnyProcess:
    """Whether `flag()` is true in any process: `ask` beside a step, and `answer` once its metrics are there.

    The question travels with the step, so the answer costs no waiting, and all processes get the same.
    """

    def __init__(self, flag: Callable[[], bool], mesh: Any):
        self._flag, self._mesh, self._asked = flag, mesh, None
        if _client() is None:
            return
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._reduce = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self) -> None:
        """Dispatch the question; like a step, in every process."""
        if _client() is not None:
            import jax
            import numpy as np

            mine = np.full(1, self._flag())
            flags = jax.make_array_from_callback((self._mesh.size,), self._each, lambda _: mine)
            self._asked = self._reduce(flags)

    def answer(self) -> bool:
        """What was true when all had asked; with one process, what is true now."""
        return self._flag() if self._asked is None else bool(self._asked)


def _state() -> Any:
    if "jax" not in sys.modules:
        return _Alone
    from jax._src import distributed

    return distributed.global_state


class _Alone:
    client, process_id = None, 0


def _client() -> Any:
    return _state().client


def _name(place: Place) -> str:
    return f"{socket.gethostname()}, process {place.process}"


def _end(place: Place, code: int, message: str) -> NoReturn:
    """End all processes with `code`. Of several that fail, the first says why.

    Not by `sys.exit`, which would wait for the others to come to their end.
    """
    client = _client()
    try:
        client.key_value_set("t2t/failed", str(code))
    except Exception:
        message = ""  # another process has told, or there is nobody left to tell
    if message:
        errors.tell(message if place.process == 0 else f"{_name(place)}: {message}")
    _leave_together(code)


def _leave_together(code: int) -> NoReturn:
    """Leave when the others know: the first process holds what they read."""
    if not _leaving.acquire(blocking=False):
        time.sleep(_LEAVE_MILLISECONDS)  # another thread is at it
    with contextlib.suppress(Exception):
        _client().wait_at_barrier("t2t/leave", _LEAVE_MILLISECONDS)
    if is_first():
        time.sleep(_LAST_SECONDS)
    _leave(code)


def _end_of_bug(place: Place, error: BaseException) -> NoReturn:
    """Leave after an exception that nothing caught: a peer's death, told in a line, or a mistake of ours."""
    if not _is_of_peer(error):
        traceback.print_exception(error)
        _leave(1)
    reason = str(error).splitlines()[0][:200]
    print(f"{_name(place)}: another process of the job is gone ({reason})", file=sys.stderr)
    _leave(LOST_PEER)


def _is_of_peer(error: BaseException) -> bool:
    """Whether it is how XLA's collectives and the coordination service tell that a process is gone."""
    names = "Gloo|NCCL|heartbeat|coordination|Connection (reset|closed)|Barrier|shut down|preempted"
    return isinstance(error, (RuntimeError, ValueError)) and bool(re.search(names, str(error)))


def _end_with_others() -> None:
    """Leave when another process has failed: this one may be waiting for it in a collective."""
    client = _client()
    while True:
        try:
            code = client.key_value_try_get("t2t/failed")
            break
        except Exception as error:
            if "NOT_FOUND" not in str(error):
                return  # this process, or the job, is at its end
        time.sleep(0.5)
    _leave_together(int(code))


def _end_with_supervisor() -> None:
    """Leave when the supervisor closes the pipe that is this process's input, or dies."""
    while os.read(0, 4096):
        pass
    _leave(LOST_PEER)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
