"""`python -m launch.chat --run FOLDER` or `--url URL`: talk to a model in the browser.

Gradio and JAX are imported only where they are needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError, require, run_command
from launch.address import is_loopback, listen

if TYPE_CHECKING:
    from launch.chat.client import Server


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.chat", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER",
        help="a run, or an export in Hugging Face's layout: its model is loaded and served in this process",
    )  # fmt: skip
    parser.add_argument(
        "--url", action="append", default=[], dest="urls", metavar="URL",
        help="of an OpenAI-compatible server, such as http://127.0.0.1:8000; any number of times",
    )  # fmt: skip
    parser.add_argument(
        "--api-key", metavar="KEY",
        help="for all servers at --url; default: $OPENAI_API_KEY, but only over https or to this machine",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where the page listens; default: 127.0.0.1"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    args = parser.parse_args(argv)
    if not args.urls and args.run is None:
        raise UserError("name a model to talk to: --run FOLDER, or --url URL of a server")
    require("serve", "httpx", "fastapi", "uvicorn", "gradio")
    servers = _servers(args.urls, args.api_key)
    with listen(args.host, args.port) as listening, contextlib.ExitStack() as engines:
        inside, mode = None, "chat"
        if args.run is not None:
            from launch.chat.client import Server
            from launch.chat.engine import started

            inside, mode = engines.enter_context(started(args.run))
            servers.insert(0, Server(inside.url))
        if not is_loopback(args.host):
            print(
                f"warning: the page listens on {args.host}: whoever reaches it uses the models"
                f"{' and the key' if any(server.key for server in servers) else ''}, without a password",
                file=sys.stderr,
            )
        from launch.chat.serve import serve

        serve(servers, inside, mode, listening)


def _servers(urls: list[str], given: str | None) -> list[Server]:
    """Those at the URLs, with the key given for them.

    The environment's was put there for another server, so it goes unasked only where nobody can read it on
    the way.
    """
    from launch.chat.client import Server

    name, key = ("--api-key", given) if given else ("$OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY"))
    if urls and key and not (key.isascii() and key.isprintable()):
        raise UserError(f"{name}: a key is made of letters, digits and signs of ASCII, which this one isn't")
    servers = []
    for server in dict.fromkeys(map(Server.of, urls)):
        if key and (given or server.is_private):
            server = Server(server.url, key)
        elif key:
            print(
                f"warning: {name} isn't sent to {server.place}, where it could be read on the way: "
                "use https, or send it all the same with --api-key",
                file=sys.stderr,
            )
        servers.append(server)
    return servers


if __name__ == "__main__":
    run_command(main)
