"""Jobs of several real processes on this machine, each with some virtual CPU devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES = 4  # of a process
# LLVM's optimizations and the emitters that lower a fusion through MLIR change no value that a test may rely
# on, and are most of the time that compiling takes; so is dividing every small program over 32 compilers.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)


def environment(cache: Path, **more: str) -> dict[str, str]:
    """As a user's shell, but that compiling is quick and what was compiled is kept in `cache`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": QUICK_COMPILES,
        **more,
    }


def start_job(arguments: list[str], cache: Path, count: int = 2) -> list[subprocess.Popen]:
    """`python ARGUMENTS` as a job of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"T2T_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "T2T_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT, env=environment(cache, **job, T2T_PROCESS=str(process)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(count)
    ]  # fmt: skip


def end_job(job: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """The exit codes and what each process wrote to its standard error."""
    try:
        said = [process.communicate(timeout=150)[1] for process in job]
    finally:
        for process in job:
            process.kill()
    lines = [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in said]
    return [process.returncode for process in job], ["\n".join(kept) for kept in lines]
