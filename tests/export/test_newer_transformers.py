"""What older and newer versions of transformers read in an export: the same model, whole.

`make test-serve` names the folder of a newer version in NEWER_TRANSFORMERS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hf_models
import numpy as np
import pytest
import transformers
from hf_models import CASES

from export import hf

NEWER = os.environ.get("NEWER_TRANSFORMERS", "")
READ = """
import sys
import numpy as np, torch, transformers
print(transformers.__version__)
for folder in sys.argv[2:]:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(told[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), (folder, told)
    with torch.no_grad():
        logits = model(torch.arange(40)[None]).logits
    np.save(f"{folder}/{sys.argv[1]}.npy", logits.numpy())
"""

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not NEWER, reason="NEWER_TRANSFORMERS names no folder: run `make test-serve`"),
]


def read(label: str, folders: list[Path], environment: dict[str, str]) -> str:
    """The version that read them; the logits lie in each folder as LABEL.npy."""
    command = [sys.executable, "-c", READ, label, *map(str, folders)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[0]


def test_newer_and_installed_transformers_read_the_same_models(tmp_path):
    folders = []
    for name in CASES:
        hf_models.write(name, tmp_path / name / "theirs", tmp_path)
        hf.main(["--import", str(tmp_path / name / "theirs"), "--out", str(tmp_path / name / "run")])
        hf.main(["--run", str(tmp_path / name / "run"), "--out", str(tmp_path / name / "ours")])
        folders.append(tmp_path / name / "ours")
    assert read("installed", folders, {}) == transformers.__version__
    assert read("newer", folders, {"PYTHONPATH": NEWER}) != transformers.__version__
    for folder in folders:
        np.testing.assert_array_equal(
            np.load(folder / "newer.npy"), np.load(folder / "installed.npy"), err_msg=str(folder)
        )
