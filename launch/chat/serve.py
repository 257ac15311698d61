"""Serves the page, by uvicorn and with a policy that keeps browsers to it."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.address import url_of
from launch.chat.catalog import Catalog
from launch.chat.client import Server
from launch.chat.inside import Inside
from launch.chat.page import build, mount_options

# Whatever a model writes or Gradio's front end links to, the browser asks no other machine for anything.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; frame-ancestors 'self'; base-uri 'self'; object-src 'none'"
)


class _WithPolicy:
    """Adds the policy to each response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"),
                ]  # fmt: skip
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await self._app(scope, receive, with_policy)


def serve(servers: Sequence[Server], inside: Inside | None, mode: str, listening: socket.socket) -> None:
    """Serve the page on a socket that listens, until interrupted."""
    page = build(Catalog(servers), inside, mode)
    host, port = listening.getsockname()[:2]
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, "/",
        server_name=host, server_port=port, **mount_options(),
    )  # fmt: skip
    # Open pages hold a stream each: waiting for those to end would be waiting for the readers.
    config = uvicorn.Config(_WithPolicy(app), log_level="warning", timeout_graceful_shutdown=1)
    print(f"chat page: {url_of(listening)}  (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    sys.stdout.flush()
