"""What `benchmarks/scaling.py` rests on: memory by arithmetic; and a sweep from end to end."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from benchmarks import scaling
from core.mesh import make_mesh
from core.options import MeshConfig
from llm.model.flops import num_parameters

TINY = scaling.BASES["tiny"]


def facts(**changes):
    """Of a small step's program, compiled for one device."""
    variant = dataclasses.replace(TINY, **changes)
    return scaling.compile_step(variant, make_mesh(MeshConfig(), jax.devices()[:1]))[0] | {"variant": variant}


@pytest.mark.parametrize("train", [{}, {"attention": "reference", "dtype": "float16"}], ids=str)
def test_memory_grows_linearly_in_layers(train):
    """By a layer's gradients and what it keeps for the backward pass."""
    few, more, most = (facts(layers=layers, train=train) for layers in (2, 3, 5))
    layer = num_parameters(more["variant"].model_config) - num_parameters(few["variant"].model_config)
    kept = scaling.kept_bytes(dataclasses.replace(TINY, layers=1, train=train), few["backend"])
    slope = more["temporaries"] - few["temporaries"]
    assert most["temporaries"] - more["temporaries"] == pytest.approx(2 * slope, rel=2e-3)
    assert slope == pytest.approx(4 * layer + kept, rel=2e-3)
    assert more["arguments"] - few["arguments"] == 12 * layer


def test_chunks_of_the_loss_bound_its_logits():
    """In the whole step: with a large vocabulary, a quarter of the positions have a quarter of the logits."""
    full, quarter = (facts(vocab=16384, train={"loss_chunk": chunk}) for chunk in (64, 16))
    logits = 4 * TINY.batch * TINY.sequence * 16384
    assert full["temporaries"] - quarter["temporaries"] > 0.95 * logits * 3 / 4


@pytest.mark.slow
def test_a_sweep(tmp_path, monkeypatch, capsys):
    """As its user runs it, with processes of their own, but for fewer variants."""
    two = {f"{n}": dataclasses.replace(TINY, layers=n) for n in (1, 2)}
    monkeypatch.setitem(scaling.SWEEPS, "layers", lambda base: two)
    figures, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    options = ["--shape", "tiny", "--sweep", "layers", "--rounds", "2"]
    scaling.main([*options, "--json", str(figures), "--plot", str(plot)])
    found = json.loads(figures.read_text())["layers"]
    assert list(found) == ["1", "2"] and plot.stat().st_size > 10_000
    assert all(len(variant["seconds"]) == 2 for variant in found.values())
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and table[2].startswith("| 1 |") and "1.00 (1.00 to 1.00)" in table[2]
    with pytest.raises(SystemExit):
        scaling.main(["--sweep", "layer"])
    assert "known are layers" in capsys.readouterr().err
