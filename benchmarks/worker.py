"""Variants of a benchmark, each in a process of its own that is idle unless asked.

So neither thread pools nor what another variant keeps in memory favor one. Commands go as lines of JSON to
stdin, answers come on stdout; whatever a framework prints there itself goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Worker:
    """`python -m COMMAND` in its own process, which must `serve`. `facts` are what it said when ready."""

    def __init__(self, *command: str, env: dict[str, str] | None = None):
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (env or {})  # they share a device
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        assert process.stdin and process.stdout
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.facts = self._answer()

    def ask(self, **command: Any) -> Any:
        print(json.dumps(command), file=self.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        self.stdin.close()
        self.process.wait()


def serve(start: Callable[[], tuple[Any, Callable[..., Any]]]) -> None:
    """In the worker: `start()` gives the facts and what answers a command's keywords, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    facts, answer = start()
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
