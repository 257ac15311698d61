"""vLLM over an export of every family: the tokens and log-probabilities that JAX has, whatever the shape."""

from __future__ import annotations

import functools
import json
import os
import subprocess

import hf_models
import jax
import numpy as np
import pytest
from hf_models import CASES, VOCAB
from numpy.testing import assert_allclose

from core.checkpoint import newest_params
from core.config import load
from core.run import RunFolder
from export import hf
from llm.config import Experiment
from llm.decode import generate
from llm.model.transformer import blueprint
from llm.sampling import Sampling, prompt_keys

PYTHON = os.environ.get("VLLM_PYTHON", "")
NEW_TOKENS = 16
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, disable_log_stats=True)
settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True, logprobs=0)
rows = [row.outputs[0] for row in model.generate(
    [{"prompt_token_ids": prompt} for prompt in json.loads(sys.argv[2])], settings)]
print("ROWS", json.dumps([
    [list(row.token_ids), [p[i].logprob for i, p in zip(row.token_ids, row.logprobs)]] for row in rows]))
"""

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python that has vLLM: run `make test-serve`"),
]


def shaped(name: str):
    """The case with a head size, and widths of experts, that vLLM has on CPUs."""
    config, theirs = CASES[name]
    changes = {
        "gpt_neox": {"hidden_size": 6 * 32},  # whose head size is width / heads, as vLLM has it of qwen2 too
        "qwen2": {"head_dim": 32, "hidden_size": 6 * 32},
        "mixtral": {"head_dim": 32, "hidden_size": 96, "intermediate_size": 64},
        "qwen3_moe": {"head_dim": 32, "hidden_size": 96, "moe_intermediate_size": 64},
    }
    return config, functools.partial(theirs, **changes.get(theirs.func.model_type, {"head_dim": 32}))


@pytest.mark.parametrize("name", CASES)
def test_vllm_continues_as_jax_does(name, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, name, shaped(name))
    hf_models.write(name, tmp_path / "theirs", tmp_path)
    hf.main(["--import", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")])
    hf.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "ours")])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (1, 7, 20, 40)]
    run = RunFolder.open(tmp_path / "run")
    config = load(Experiment, run.config).model
    params = newest_params(run, blueprint(config).shapes)
    ours = generate(config, params, prompts, prompt_keys(jax.random.key(0), prompts), Sampling(), NEW_TOKENS)
    done = subprocess.run(
        [PYTHON, "-c", VLLM, str(tmp_path / "ours"), json.dumps(prompts), str(NEW_TOKENS)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
    assert said, done.stderr[-3000:]
    for row, (token_ids, log_probabilities) in zip(ours, json.loads(said[0][5:]), strict=True):
        assert token_ids == row.token_ids
        assert_allclose(log_probabilities, row.log_probabilities, rtol=0, atol=1e-3)
