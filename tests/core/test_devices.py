"""Devices by our names and by JAX's, and the flags that XLA starts with, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.devices import CPU_FLAGS, DEVICES, GPU_FLAGS, named, peak_flops
from core.errors import UserError

ROOT = Path(__file__).parents[2]
OFF = GPU_FLAGS[0].replace("=true", "=false")
LONGER = GPU_FLAGS[0].replace("=", "_again=")  # a name that begins with one of ours


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("TPU v4", 275e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v6 lite", 918e12, None),
    ],
)
def test_a_known_device_has_its_dense_peak(kind, bfloat16, float32):
    assert peak_flops(kind, "bfloat16") == bfloat16
    assert peak_flops(kind, "float32") == float32


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "TPU v4 lite",
        "TPU7x",
    ],
)
def test_an_unknown_device_has_none_rather_than_a_wrong_one(kind):
    assert peak_flops(kind, "bfloat16") is None


def test_a_kind_is_one_device_and_halves_are_as_fast_as_each_other():
    kinds = Counter(kind for device in DEVICES.values() for kind in device.kinds)
    assert max(kinds.values()) == 1
    for name, device in DEVICES.items():
        assert device.peaks.get("float16", device.peaks["bfloat16"]) == device.peaks["bfloat16"]
        assert ("float16" in device.peaks) == (not name.startswith("tpu"))


def test_devices_by_name():
    assert named("a100-80gb").memory == 80e9 and named("a100-40gb").memory == 40e9
    with pytest.raises(UserError, match="did you mean h100"):
        named("H10O")
    with pytest.raises(UserError, match="known are a100-40gb, "):
        named("abacus")


def start(tmp_path: Path, plugin: str | None, program: str, given: str = "") -> subprocess.CompletedProcess:
    """Run `program` after `prepare()`, where JAX has the CPU and this plugin, which knows no device."""
    if plugin is not None:
        folder = tmp_path / "jax_plugins" / plugin
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    return subprocess.run(
        [sys.executable, "-c", f"import os; from core.devices import prepare; prepare(); {program}"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": given},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("plugin", "flags"), [(None, CPU_FLAGS), ("xla_cuda13", GPU_FLAGS)])
def test_the_installed_xla_knows_every_flag(tmp_path, plugin, flags):
    """It ends the process at a flag that it doesn't know: the second one shows that this would be seen."""
    program = "import jax; print(os.environ['XLA_FLAGS']); print(jax.jit(lambda x: x + 1)(1))"
    done = start(tmp_path, plugin, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{' '.join(flags)}\n2\n"
    unknown = start(tmp_path / "again", plugin, program, "--xla_gpu_enable_latency_hidin=true")
    assert unknown.returncode != 0 and "xla_gpu_enable_latency_hidin" in unknown.stderr


@pytest.mark.parametrize(
    ("plugin", "given", "expected"),
    [
        ("xla_cuda12", OFF, (*GPU_FLAGS[1:], OFF)),
        ("xla_cuda13", LONGER, (*GPU_FLAGS, LONGER)),
        ("xla_cuda13", "flags.txt", ("flags.txt",)),
        ("xla_cuda13", "--xla_dump_to=/tmp/x", (*GPU_FLAGS, "--xla_dump_to=/tmp/x")),
        ("xla_rocm7", "", ()),
    ],
)
def test_flags_of_the_user_win(tmp_path, plugin, given, expected):
    done = start(tmp_path, plugin, "print(os.environ['XLA_FLAGS'])", given)
    assert done.stdout.split() == list(expected), done.stderr


def test_every_flag_is_documented():
    text = (ROOT / "docs/gpu.md").read_text()
    for flag in (*CPU_FLAGS, *GPU_FLAGS):
        assert flag.partition("=")[0].removeprefix("--xla_gpu_") in text
