"""Answers for as long as the client listens and no longer than they may take; server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from launch.server.errors import ApiError

_log = logging.getLogger(__name__)


class Deadline:
    """The end of the time that a request has, `seconds` from now."""

    def __init__(self, seconds: float | int):
        self.seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._at - time.monotonic())


class Events(Response):
    """`data: {...}` for each object, then `data: [DONE]`; `ended` is called in any case.

    A client that goes, or reads so slowly that the time runs out, is not waited for.
    """

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncIterator[dict[str, Any]], ended: Callable[[], None], deadline: Deadline):
        self.objects, self.ended, self.deadline = objects, ended, deadline
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    def init_headers(self, headers=None) -> None:
        super().init_headers(headers)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope, receive, send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, timeout=self.deadline.left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.ended()
            await _end(pump, gone)

    async def _pump(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for item in self.objects:
                await self._send(send, _json(item))
        except Exception:
            _log.exception("a stream failed")
            await self._send(send, _json(ApiError("the server failed", status=500).body))
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _json(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False, allow_nan=False)


async def while_connected(request: Request, work: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
    """The result of `work`, which ends when the client goes or the time is up.

    Raises:
        ApiError: in both cases; the first reaches nobody.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError("the client has gone", status=499)
        raise ApiError(f"the answer took longer than {deadline.seconds:g} s", status=504, code="timeout")
    finally:
        await _end(task, gone)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
