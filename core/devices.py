"""What is known of each kind of device: its dense peaks, and how XLA is told to use it.

Peaks are the vendors' dense figures in FLOP/s (no sparsity), by the dtype of the operands. An unknown
device has none: no utilization is better than a wrong one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

_A100 = {"bfloat16": 312e12, "float32": 156e12}  # float32: TF32 on the tensor cores
_H100 = {"bfloat16": 989e12, "float32": 494e12}

PEAK_FLOPS: dict[str, dict[str, float]] = {  # by JAX's `device_kind`, whole: A1000 is no A100
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
    "NVIDIA H200": _H100,
    "NVIDIA B200": {"bfloat16": 2250e12, "float32": 1125e12},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5": {"bfloat16": 459e12},  # v5p
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5 lite": {"bfloat16": 197e12},  # v5e
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v6 lite": {"bfloat16": 918e12},  # v6e
    "TPU v6e": {"bfloat16": 918e12},
}

# Each flag was measured: see docs/log.md.
CPU_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=true",  # independent products side by side
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of one device, or None where it is not known."""
    return PEAK_FLOPS.get(device_kind, {}).get(dtype)


def prepare() -> None:
    """Set what XLA reads when JAX is first imported. Call it before `import jax`; it imports nothing.

    Compiled programs are kept in `$XDG_CACHE_HOME/token-to-tensor` unless `JAX_COMPILATION_CACHE_DIR`
    names another place; flags that `XLA_FLAGS` already holds win.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "token-to-tensor"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "jax"))
    if importlib.util.find_spec("jax_plugins") is None:
        given = os.environ.get("XLA_FLAGS", "")
        ours = [flag for flag in CPU_FLAGS if flag.partition("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([*ours, given]).strip()
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation; elsewhere, nothing. Before threads start.

    XLA allocates the temporaries of a program at each execution. By default glibc returns such large
    blocks to the system when freed, so that every step would fault in all its pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, ... of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)  # a thread's own arena is unmapped when empty, whatever the threshold
