"""Rates and model FLOPs utilization, against a calculation by hand on a clock that stands still."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

import core.meter
from core.config import load
from core.devices import peak_flops
from core.mesh import make_mesh
from core.meter import Meter
from core.options import MeshConfig
from llm.config import Experiment
from llm.model.flops import training_flops_per_token

CONFIG = Path(__file__).parents[2] / "configs/llm/llama2-7b.yaml"


def test_utilization_by_hand(monkeypatch):
    """Of 8 A100 in bfloat16, counting neither evaluation nor checkpoints as training."""
    now = 100.0
    monkeypatch.setattr(core.meter.time, "perf_counter", lambda: now)
    monkeypatch.setattr(
        core.meter, "peak_flops", lambda kind, dtype: peak_flops("NVIDIA A100-SXM4-80GB", dtype)
    )
    mesh = make_mesh(MeshConfig(fsdp=8))
    experiment = load(Experiment, CONFIG)
    flops = 6 * 6_607_077_376 + 32 * 12 * 4096 * 4096 // 2  # of a token; the second term is attention's
    assert training_flops_per_token(experiment.model, 4096) == flops
    tokens = 16 * 4096
    meter = Meter("tokens", tokens, flops, "bfloat16", mesh)
    for name, seconds in [("data", 1), ("evaluation", 5), ("checkpoint", 2)]:
        with meter.lap(name):
            now += seconds
    now += 49
    got = meter.measure(3)
    assert got["mfu"] == pytest.approx(tokens * flops / 50 / (8 * 312e12))
    assert got["tokens_per_second"] == pytest.approx(tokens / 50) and got["tokens"] == 3 * tokens
    assert (got["data_seconds"], got["compute_seconds"], got["checkpoint_seconds"]) == (1, 49, 2)
    now += 25
    assert meter.measure(4)["mfu"] == pytest.approx(2 * got["mfu"]), "each measurement starts anew"


def test_no_utilization_where_the_peak_is_not_known():
    meter = Meter("tokens", 1, 1e9, "bfloat16", make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert "mfu" not in meter.measure(1)
