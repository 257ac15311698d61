"""An answer as it comes: its text, its rates, and an end that is the server's or the reader's."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launch.chat.client import Model, Server, ServerError, foreign, stream

SECONDS_BETWEEN_UPDATES = 0.08  # a page redrawn at each token of a fast server would freeze


@dataclass(frozen=True)
class Settings:
    """How an answer is drawn. 0 for `top_k` and None for `seed` leave them to the server."""

    temperature: float | int = 0.8
    top_p: float | int = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """As a request's body has them."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        if self.top_k:  # not in OpenAI's own interface, whose servers refuse what they don't know
            given["top_k"] = self.top_k
        if self.seed is not None:
            given["seed"] = self.seed
        return given


@dataclass
class Progress:
    """An answer so far. Times are seconds of `time.perf_counter`."""

    started: float
    text: str = ""
    pieces: int = 0
    tokens: int | None = None  # where the server tells
    first_tokens: int = 1  # that came with the first piece
    first: float | None = None
    last: float | None = None
    ended: str = ""  # why, when it has: "stop", "length", "stopped"

    def add(self, chunk: Mapping[str, Any], now: float) -> None:
        """Take in a chunk of `/v1/chat/completions` or `/v1/completions`.

        Raises `AttributeError` or `TypeError` for one of another form.
        """
        for choice in chunk.get("choices") or ():
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if piece:
                self.text += _whole(piece)
                self.pieces += 1
                self.first = now if self.first is None else self.first
                self.last = now
            self.ended = str(choice.get("finish_reason") or self.ended)
        if count := (chunk.get("usage") or {}).get("completion_tokens"):
            self.tokens = operator.index(count)
        if self.pieces == 1 and self.tokens:
            self.first_tokens = self.tokens

    @property
    def rate(self) -> float | None:
        """Tokens a second from the first piece to the last; the wait for the first is told beside it.

        Of pieces where the server doesn't count tokens: most send one a piece.
        """
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        more = self.pieces - 1 if self.tokens is None else self.tokens - self.first_tokens
        return more / (self.last - self.first) if more > 0 else None

    def note(self) -> str:
        """The rates in one line."""
        if self.first is None:
            return {"": "Waiting for the first token …", "stopped": "Stopped before the first token."}.get(
                self.ended, "The model ended its answer at once."
            )
        count, unit = (self.pieces, "piece") if self.tokens is None else (self.tokens, "token")
        parts = [f"{count} {unit}{'s' * (count != 1)}"]
        if self.rate is not None:
            parts.append(f"{self.rate:.1f} {unit}s/s")
        parts.append(f"first token after {self.first - self.started:.2f} s")
        why = {"length": "limit reached", "stopped": "stopped"}.get(self.ended)
        return " · ".join([*parts, why] if why else parts)


class Answering:
    """One request at work, which `stop` ends from elsewhere."""

    def __init__(self, server: Server, path: str, body: Mapping[str, Any]) -> None:
        self._server, self._chunks = server, stream(server, path, body)
        self.progress = Progress(time.perf_counter())
        self._task: asyncio.Task | None = None
        self._stopped = False

    def stop(self) -> None:
        """Close the connection, so that the server ends the work too; `updates` then ends."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def updates(self) -> AsyncIterator[Progress]:
        """The answer so far, now and then, and at its end. Raises `ServerError`."""
        self._task = asyncio.create_task(self._read())
        if self._stopped:
            self._task.cancel()
        try:
            while not self._task.done():
                yield self.progress
                await asyncio.wait([self._task], timeout=SECONDS_BETWEEN_UPDATES)
            with suppress(asyncio.CancelledError):
                self._task.result()
            self.progress.ended = "stopped" if self._stopped else self.progress.ended
            yield self.progress
        finally:
            self._task.cancel()

    async def _read(self) -> None:
        try:
            async for chunk in self._chunks:
                self.progress.add(chunk, time.perf_counter())
        except (AttributeError, TypeError):
            raise ServerError(foreign(self._server)) from None
        finally:
            await self._chunks.aclose()  # type: ignore[attr-defined]


def _whole(piece: str) -> str:
    """A piece without halves of UTF-16 pairs, which JSON can hold and no page or request can."""
    return piece.encode("utf-8", "replace").decode()


def messages_of(history: Sequence[Mapping[str, str]], system: str = "") -> list[dict[str, str]]:
    """A chat as a request has it: the system prompt if any, then turns by the user and the model in turn.

    A question whose answer failed stands before the next question: chat templates want turns to alternate,
    so they become one. Texts that were completed are no part of the chat.
    """
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for message in history:
        role, text = message["role"], message["content"]
        if message["mode"] != "chat" or not text.strip():
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def request_for(
    mode: str, model: Model, history: Sequence[Mapping[str, str]], system: str, settings: Settings
) -> tuple[str, dict[str, Any]]:
    """The path and the body that ask for the answer to a history's last message.

    `mode` is "chat", or "complete": then the last message is continued as text, without the turns before
    it and without a template, which is what a model without instruction tuning knows.
    """
    counts = {"continuous_usage_stats": True} if model.counts else {}
    body = {
        "model": model.name,
        "stream": True,
        "stream_options": {"include_usage": True, **counts},
        **settings.fields(),
    }
    if mode == "chat":
        return "chat/completions", {**body, "messages": messages_of(history, system)}
    return "completions", {**body, "prompt": history[-1]["content"]}
