"""What `make` refuses, and what it hands on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


@pytest.mark.parametrize("accelerator", ["gpu", "CUDA", "", "cpu cuda"])
def test_an_unknown_accelerator_is_refused(accelerator):
    done = make("-n", "quickstart", f"ACCEL={accelerator}")
    assert done.returncode == 2 and "must be cpu or cuda" in done.stderr and not done.stdout


def test_the_quickstart_takes_one_gpu(tmp_path):
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "[$CUDA_VISIBLE_DEVICES]"\n')  # in place of each command
    shell.chmod(0o755)
    for chosen, expected in [({}, "[0]"), ({"CUDA_VISIBLE_DEVICES": "3"}, "[3]")]:
        done = make("-sB", "-o", ".venv/.cpu", "quickstart", "ACCEL=cpu", f"SHELL={shell}", **chosen)
        assert done.returncode == 0 and set(done.stdout.split()) == {expected}, done
