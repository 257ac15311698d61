"""How much memory an import and an export take: that of a few tensors, whatever the model's size."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import CASES, write
from runs import ROOT

from export.families import family_of
from export.families.table import tensors
from export.shards import write_tensors
from export.write import shapes_of

# Everything that is loaded, compiled or allocated once is so after the small model.
PROGRAM = """
import sys
from pathlib import Path
from core.run import RunFolder
from export.read import import_run
from export.write import export_run

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

small, large, out = map(Path, sys.argv[1:])
peaks = []
for folder in (small, large):
    run = out / "runs" / folder.name
    import_run(folder, run)
    peaks.append(peak())
    export_run(RunFolder.open(run), out / folder.name)
    peaks.append(peak())
print(peaks[2] - peaks[1], peaks[3] - peaks[1])
"""
LAYERS = 28
BOUND = 64e6  # bytes: some tensors of 3 MB
# glibc raises the threshold as it likes, and then keeps some tens of megabytes that were freed.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1000000"}


@pytest.mark.slow
def test_a_few_tensors_are_in_memory_at_a_time(tmp_path):
    (tmp_path / "corpus").mkdir()
    small = write("llama", tmp_path / "small", tmp_path / "corpus")
    config = dataclasses.replace(CASES["llama"][0], num_layers=LAYERS, embed_dim=384, mlp_dim=2048)
    family = family_of(config)
    shapes = {tensor.name: tensor.shape for tensor in tensors(family.table, shapes_of(config))}
    large = tmp_path / "large"
    large.mkdir()
    values = (np.ones(shape, np.float32) for shape in shapes.values())
    write_tensors(large, shapes, np.dtype(np.float32), values, shard_bytes=1 << 25)
    (large / "config.json").write_text(json.dumps(family.to_json(config)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (large / name).write_bytes((small / name).read_bytes())
    size = 4 * sum(map(math.prod, shapes.values()))
    assert size > 4 * BOUND
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, large, tmp_path / "out"],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported, exported = map(int, done.stdout.split())
    assert imported < BOUND and exported < BOUND, f"{imported / 1e6:.0f} and {exported / 1e6:.0f} MB"
    total = sum(file.stat().st_size for file in Path(tmp_path / "out/large").glob("*.safetensors"))
    assert size < total < 1.01 * size
