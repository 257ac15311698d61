"""What is known of each kind of device: its dense peaks and its memory, and how XLA is told to use it.

Peaks are the vendors' dense figures in FLOP/s (no sparsity), by the dtype of the operands; memory is what the
data sheet says, in bytes, a gigabyte being 10**9. An unknown device has no peak: no utilization is better
than a wrong one. So H100 NVL and H200 NVL are left out: their dense figures could not be checked.

Bandwidths are bytes a second, of data sheets too. What one device sends to others, each way:
- NVIDIA's, within a node: half of the NVLink figure, which adds both directions (600, 900, 1,800 GB/s for the
  third to the fifth generation), or PCIe 5.0's 64 GB/s; between nodes: the network card that each GPU of a
  DGX has for itself (A100: 200 Gbit/s; H100, H200, B200: 400 Gbit/s).
- TPUs', within a slice: a ring over one mesh axis uses both directions of one axis of the torus, two links.
  Cloud TPU's pages give a chip's links together, each way: v4 2,400 Gbit/s over 6, v5e 1,600 over 4, v5p
  4,800 over 6, v6e 3,200 over 4. Between slices: a chip's share of the data center network (v4, v5p 50
  Gbit/s, v5e 25, v6e 100). A "node" is the largest slice.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib.util
import os
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError

_GB, _TERA = 10**9, 1e12


@dataclass(frozen=True)
class Device:
    """One chip. `kinds` are the `device_kind`s by which JAX calls it, whole: A1000 is no A100."""

    kinds: tuple[str, ...]
    peaks: dict[str, float]  # FLOP/s by dtype; float32 on NVIDIA's is TF32 on the tensor cores
    memory: int  # bytes
    memory_bandwidth: float | int  # bytes a second
    link_bandwidth: float | int  # to others of its node
    network_bandwidth: float | int  # to other nodes
    node: int = 8  # devices in one


def _peaks(half: int, single: int) -> dict[str, float]:
    return {"bfloat16": half * _TERA, "float16": half * _TERA, "float32": single * _TERA}


_A100, _H100 = _peaks(312, 156), _peaks(989, 494)
_HDR, _NDR = 25 * _GB, 50 * _GB  # InfiniBand at 200 and 400 Gbit/s

DEVICES = {
    "a100-40gb": Device(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), _A100, 40 * _GB, 1555 * _GB, 300 * _GB, _HDR
    ),
    "a100-80gb": Device(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), _A100, 80 * _GB, 2039 * _GB, 300 * _GB, _HDR
    ),
    "h100": Device(("NVIDIA H100 80GB HBM3",), _H100, 80 * _GB, 3350 * _GB, 450 * _GB, _NDR),
    "h100-pcie": Device(("NVIDIA H100 PCIe",), _peaks(756, 378), 80 * _GB, 2000 * _GB, 64 * _GB, _NDR),
    "h200": Device(("NVIDIA H200",), _H100, 141 * _GB, 4800 * _GB, 450 * _GB, _NDR),
    "b200": Device(("NVIDIA B200",), _peaks(2250, 1125), 180 * _GB, 8000 * _GB, 900 * _GB, _NDR),
    "tpu-v4": Device(
        ("TPU v4",), {"bfloat16": 275 * _TERA}, 32 * _GB, 1228 * _GB, 100 * _GB, 6.25 * _GB, node=4096
    ),
    "tpu-v5e": Device(
        ("TPU v5 lite", "TPU v5e"),
        {"bfloat16": 197 * _TERA}, 16 * _GB, 819 * _GB, 100 * _GB, 3.125 * _GB, node=256,
    ),
    "tpu-v5p": Device(
        ("TPU v5", "TPU v5p"),
        {"bfloat16": 459 * _TERA}, 95 * _GB, 2765 * _GB, 200 * _GB, 6.25 * _GB, node=8960,
    ),
    "tpu-v6e": Device(
        ("TPU v6 lite", "TPU v6e"),
        {"bfloat16": 918 * _TERA}, 32 * _GB, 1600 * _GB, 200 * _GB, 12.5 * _GB, node=256,
    ),
}  # fmt: skip

# What each flag does, where it comes from and what it was measured to give: docs/gpu.md.
CPU_FLAGS = ("--xla_cpu_enable_concurrency_optimized_scheduler=true",)
GPU_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    f"--xla_gpu_all_gather_combine_threshold_bytes={512 << 20}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={512 << 20}",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={512 << 20}",
)


def named(name: str) -> Device:
    """The device of that short name.

    Raises:
        UserError: for a name that is not in `DEVICES`.
    """
    if name not in DEVICES:
        near = [known for known in DEVICES if known.startswith(name.lower())]
        near = near or difflib.get_close_matches(name.lower(), DEVICES, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near and name else f"known are {', '.join(DEVICES)}"
        raise UserError(f"the device '{name}' is not known; {hint}")
    return DEVICES[name]


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of one device, by JAX's `device_kind`, or None where it is not known."""
    return next((d.peaks.get(dtype) for d in DEVICES.values() if device_kind in d.kinds), None)


def prepare() -> None:
    """Set what XLA reads when JAX is first imported. Call it before `import jax`; it imports nothing.

    Compiled programs are kept in `$XDG_CACHE_HOME/token-to-tensor` unless `JAX_COMPILATION_CACHE_DIR`
    names another place. XLA is given the flags for what JAX was installed for: CUDA, or nothing but the CPU.
    Flags that `XLA_FLAGS` already holds win.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "token-to-tensor"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "jax"))
    spec = importlib.util.find_spec("jax_plugins")
    plugins = [m.name for m in pkgutil.iter_modules((spec and spec.submodule_search_locations) or ())]
    if not plugins:
        _add_flags(CPU_FLAGS)
        keep_freed_memory()
    elif any(name.startswith("xla_cuda") for name in plugins):
        _add_flags(GPU_FLAGS)


def _add_flags(flags: tuple[str, ...]) -> None:
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        return  # the name of a file that holds flags, which XLA takes instead of flags, not beside them
    names = {flag.partition("=")[0] for flag in given.split()}
    ours = [flag for flag in flags if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*ours, given]).strip()


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
