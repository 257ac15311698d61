"""Tests run on eight virtual CPU devices, with the shapes in signatures checked at run time."""

from __future__ import annotations

import os
import subprocess

import pytest
from processes import QUICK_COMPILES

# XLA reads its flags when the devices are first asked for; commands that tests start get none.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["XLA_FLAGS"] = QUICK_COMPILES
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jaxtyping

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()
del os.environ["XLA_FLAGS"]

jaxtyping.install_import_hook(["core", "rl", "llm", "clip", "export", "launch"], "beartype.beartype")


def pytest_configure(config):
    # Of an annotation inside Flax.
    config.addinivalue_line(
        "filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    )


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Hundreds of compiled programs would hold gigabytes until the end of the suite."""
    yield
    jax.clear_caches()


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk can't be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
