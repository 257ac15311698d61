"""What a server is started with, and what a mistake is answered with; vLLM itself is in test_vllm.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from core.errors import UserError
from launch.address import listen
from launch.serve import main
from launch.vllm import Settings

LLAMA3_70B = {
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
}
SCHEME = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("change", "gpus", "expected"),
    [
        ({}, 8, "--dtype bfloat16 --tensor-parallel-size 8"),
        ({}, 7, "--dtype bfloat16 --tensor-parallel-size 4"),
        # Sixteen GPUs hold each of the eight key-value heads twice.
        ({}, 16, "--dtype bfloat16 --tensor-parallel-size 16"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 3,
         "--dtype bfloat16 --tensor-parallel-size 2"),
        ({"quantization_config": SCHEME}, 1,
         "--dtype bfloat16 --quantization compressed-tensors --tensor-parallel-size 1"),
        ({"dtype": None, "torch_dtype": "float32"}, 0, "--dtype float32 --enforce-eager"),
    ],
)  # fmt: skip
def test_settings_follow_from_the_export(change, gpus, expected):
    settings = Settings.of(LLAMA3_70B | change, gpus, 2**40)
    assert settings.arguments == ["--max-model-len", "8192", *expected.split()]


def test_the_cpu_s_cache_holds_whole_sequences():
    # 2 (keys and values) x 80 layers x 8 heads x 128 x 2 bytes x 8192 tokens are 2.5 GiB a sequence.
    assert Settings.of(LLAMA3_70B, 0, 2**40).environment == {"VLLM_CPU_KVCACHE_SPACE": "20"}
    assert Settings.of(LLAMA3_70B, 0, 16 * 2**30).environment == {"VLLM_CPU_KVCACHE_SPACE": "8"}
    assert Settings.of(LLAMA3_70B, 1, 2**40).environment == {}


@pytest.mark.parametrize("key", ["max_position_embeddings", "dtype", "num_attention_heads"])
def test_a_config_that_lacks_something_is_named(key):
    with pytest.raises(UserError, match=f"names no '{key}'"):
        Settings.of({k: v for k, v in LLAMA3_70B.items() if k != key}, 0, 2**40)


@pytest.fixture
def export(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_70B))
    return tmp_path


def test_mistakes_are_named(export, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        main(["--model", str(tmp_path / "none")])
    with pytest.raises(UserError, match="the API key is empty"):
        main(["--model", str(export), "--api-key", ""])
    with pytest.raises(UserError, match="can't be run"):
        main(["--model", str(export), "--vllm-python", str(tmp_path / "python")])
    with pytest.raises(UserError, match=r"has no vLLM.*--engine jax"):
        main(["--model", str(export)])
    (export / "config.json").rename(export / "config.yaml")
    with pytest.raises(UserError, match=r"is a run.*export\.hf --run.*--engine jax"):
        main(["--model", str(export)])
    (export / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.json can't be read"):
        main(["--model", str(export)])


def test_a_port_that_cannot_be_had_is_named(export, monkeypatch):
    monkeypatch.setattr("launch.vllm.probe", lambda python: ("0", 0))
    with pytest.raises(UserError, match="--port 70000"):
        main(["--model", str(export), "--port", "70000"])
    with pytest.raises(UserError, match=r"--host nowhere\.invalid"):
        main(["--model", str(export), "--host", "nowhere.invalid"])
    refused = pytest.raises(UserError, match=r"can't listen on.*address already in use")
    with listen("127.0.0.1", 0) as taken, refused:
        main(["--model", str(export), "--port", str(taken.getsockname()[1])])


def test_help_needs_no_jax():
    code = (
        "import atexit, sys\n"
        "from launch import serve\n"
        "atexit.register(lambda: print('jax' in sys.modules))\n"
        "serve.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
