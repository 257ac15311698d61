"""`python -m launch.serve --model DIR`: serve a model to OpenAI's clients, with vLLM or from JAX.

vLLM takes a Hugging Face folder, such as `python -m export.hf` writes. `--engine jax` takes a run too, and
needs no more than the `serve` extra. Both answer on /v1/models, /v1/completions and /v1/chat/completions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from core.errors import UserError, run_command
from core.signals import Stop
from launch.address import is_loopback

KEY_VARIABLE = "SERVE_API_KEY"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.serve", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="an export, or with jax a run"
    )
    parser.add_argument("--engine", choices=("vllm", "jax"), default="vllm", help="default: vllm")
    parser.add_argument("--name", help="of the model, in requests; default: the folder's")
    parser.add_argument(
        "--host", default="127.0.0.1", help="who may connect; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one; default: 8000")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"refuse requests that don't bring it; default: ${KEY_VARIABLE}, which others can't see in ps",
    )
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        metavar="PYTHON",
        help="of the environment that has vLLM; default: this one",
    )
    args = parser.parse_args(argv)
    if not args.model.is_dir():
        raise UserError(f"--model {args.model}: there is no such folder")
    if args.api_key == "":
        raise UserError(f"the API key is empty, which is none: set --api-key or ${KEY_VARIABLE}, or neither")
    if not is_loopback(args.host) and args.api_key is None:
        print(f"{args.host} can be reached from other machines, and no --api-key is asked for", flush=True)
    name = args.name or args.model.resolve().name
    with Stop() as stop, _server(args, name, stop) as (url, ended):
        if stop.signal is None:
            call = _call(url, name, args.api_key)
            print(f"\n{name} answers at {url}\n\n{call}\n\nCtrl-C stops it.", flush=True)
        while stop.signal is None:
            if (why := ended()) is not None:
                raise UserError(why)
            time.sleep(0.1)
        print(f"stopping: {stop.signal}", flush=True)


@contextlib.contextmanager
def _server(
    args: argparse.Namespace, name: str, stop: Stop
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The base URL of a server that answers, and what tells why it ended, None while it runs."""
    if args.engine == "jax":
        from core import devices, log

        log.setup("llm", "launch")
        devices.prepare()
        from launch.server import check_installed
        from launch.server import running as running_jax
        from launch.server.model import Served

        check_installed()
        served = Served.of(args.model, name)
        with running_jax(served, args.host, args.port, api_key=args.api_key) as (url, ended):
            yield f"{url}/v1", ended
        return
    from launch.vllm import running as running_vllm

    with running_vllm(
        args.model,
        name,
        args.host,
        args.port,
        args.vllm_python,
        args.api_key,
        lambda: stop.signal is not None,
    ) as (url, ended):
        yield url, ended


def _call(url: str, name: str, api_key: str | None) -> str:
    """A shell command that asks the server something; a key isn't written where logs would keep it."""
    body = json.dumps({"model": name, "prompt": "def read_file(path):", "max_tokens": 40})
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if api_key else ""
    return f"curl {url}/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


if __name__ == "__main__":
    run_command(main)
