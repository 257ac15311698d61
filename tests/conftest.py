"""Every test runs on eight virtual CPU devices, with the shapes in signatures checked at run time."""

from __future__ import annotations

import os

# Tests state what the code does on its own: no flags and no compiled programs of the user's.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jaxtyping

jax.config.update("jax_default_matmul_precision", "highest")
jaxtyping.install_import_hook(["core", "llm"], "beartype.beartype")
