"""The endpoints: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health`."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from core.errors import UserError
from launch.server.answers import Answer, ChatAnswer, CompletionAnswer, Prompt
from launch.server.errors import ApiError
from launch.server.events import Deadline, Events, while_connected
from launch.server.limits import Limits
from launch.server.model import Served
from launch.server.protocol import Ask, ChatAsk, CompletionAsk, read
from llm.chat import encode_chat, end_of_turn_ids
from llm.engine import Busy, Engine, Piece, Ticket
from llm.engine import Request as Job
from llm.generate import encode_prompt
from llm.sampling import Sampling

_log = logging.getLogger(__name__)
_GREEDY = 1e-5  # a temperature below which scores divided by it would overflow


def make_app(served: Served, engine: Engine, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The application before a started engine.

    Raises:
        UserError: if the API key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise UserError("an empty API key is no key: leave it out or give one")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(served, engine, limits, api_key)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/completions", server.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    return app


class _Server:
    def __init__(self, served: Served, engine: Engine, limits: Limits, api_key: str | None):
        self.served, self.engine, self.limits = served, engine, limits
        self._key = None if api_key is None else api_key.strip().encode()
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        alive = self.engine.alive
        status = {"status": "ok" if alive else "the engine has stopped", **self.engine.status()._asdict()}
        return JSONResponse(status, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        model = {
            "id": self.served.name,
            "object": "model",
            "created": self._started,
            "owned_by": "token-to-tensor",
            "max_model_len": self.served.config.max_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionAsk)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsk)

    async def _answer(self, request: Request, kind: type[Ask]) -> Response:
        self._authorize(request)
        _check_type(request)
        ask = read(await self._body(request), kind)
        deadline = Deadline(self.limits.request_seconds)
        if ask.model is not None and ask.model != self.served.name:
            raise ApiError(
                f"there is no model of this name here, only '{self.served.name}'",
                "model",
                status=404,
                code="model_not_found",
            )
        if _count(ask) > self.limits.choices:
            raise ApiError(f"prompts times 'n' may be at most {self.limits.choices}", "n")
        prompts = await while_connected(request, asyncio.to_thread(self._read_prompts, ask), deadline)
        jobs = self._jobs(ask, prompts)
        answer_of = ChatAnswer if isinstance(ask, ChatAsk) else CompletionAnswer
        answer: Answer = answer_of(self.served, ask, prompts)
        pieces, tickets = self._submit(jobs)

        def cancel() -> None:
            for ticket in tickets:
                ticket.cancel()

        if ask.stream:
            return Events(_streamed(answer, pieces, tickets), cancel, deadline)
        try:
            return JSONResponse(await while_connected(request, _whole(answer, pieces, tickets), deadline))
        finally:
            cancel()

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")  # as it came
        if scheme.lower() != "bearer" or not secrets.compare_digest(given, self._key):
            raise ApiError(
                "this server needs its API key, as 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
            )

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body_bytes:
                        raise ApiError(f"the body is larger than {self.limits.body_bytes} bytes", status=413)
        except TimeoutError:
            raise ApiError(
                f"the body did not come within {self.limits.body_seconds:g} s", status=408
            ) from None
        return bytes(body)

    def _read_prompts(self, ask: Ask) -> list[Prompt]:
        try:
            return self._prompts(ask)
        except ApiError:
            raise
        except Exception:  # a StopIteration would never leave a future, and its request hang
            _log.exception("reading a prompt failed")
            raise ApiError("the server failed", status=500) from None

    def _prompts(self, ask: Ask) -> list[Prompt]:
        tokenizer = self.served.tokenizer
        if isinstance(ask, ChatAsk):
            messages = [{"role": message.role, "content": message.text} for message in ask.messages]
            try:
                return [Prompt(None, encode_chat(tokenizer, messages))]
            except UserError as error:
                raise ApiError(str(error), "messages") from None
        assert isinstance(ask, CompletionAsk)
        return [
            Prompt(prompt, encode_prompt(tokenizer, prompt))
            if isinstance(prompt, str)
            else Prompt(None, prompt)
            for prompt in ask.prompt
        ]

    def _jobs(self, ask: Ask, prompts: list[Prompt]) -> list[Job]:
        """What the engine has to do, for each prompt `n` times."""
        vocab = self.served.config.vocab_size
        if not all(0 <= i < vocab for i in ask.stop_token_ids):
            raise ApiError(f"'stop_token_ids' has ids outside 0 to {vocab - 1}", "stop_token_ids")
        sampling = Sampling()
        if ask.temperature >= _GREEDY:
            top_k = None if ask.top_k <= 0 else min(ask.top_k, vocab)
            sampling = Sampling.of(ask.temperature, top_k, ask.top_p)
        end = [] if ask.ignore_eos else end_of_turn_ids(self.served.tokenizer)
        top, score = 0, False
        if isinstance(ask, ChatAsk):
            top = ask.top_logprobs
        elif isinstance(ask, CompletionAsk):
            top, score = ask.logprobs or 0, ask.echo and ask.logprobs is not None
        jobs: list[Job] = []
        seen: list[list[int]] = []
        for prompt in prompts:
            count = self._room(ask, prompt)
            for _ in range(ask.n):
                jobs.append(
                    Job(
                        prompt.ids,
                        count,
                        sampling,
                        None if ask.seed is None else ask.seed % 2**32,
                        seen.count(prompt.ids),
                        frozenset([*end, *ask.stop_token_ids]),
                        top,
                        score,
                    )
                )
                seen.append(prompt.ids)
        return jobs

    def _room(self, ask: Ask, prompt: Prompt) -> int:
        """How many tokens to draw: as many as asked for, by default 16 or, in a chat, all that fit."""
        config, length = self.served.config, len(prompt.ids)
        name = "messages" if isinstance(ask, ChatAsk) else "prompt"
        if not prompt.ids:
            raise ApiError("the prompt is empty: it must have at least one token", name)
        if not all(0 <= i < config.vocab_size for i in prompt.ids):
            raise ApiError(f"the prompt has token ids outside 0 to {config.vocab_size - 1}", name)
        left = config.max_length - length
        count = ask.max_tokens
        if count is None:
            count = max(left, 1) if isinstance(ask, ChatAsk) else max(min(16, left), 1)
        if count > left:
            raise ApiError(
                f"this model's context is {config.max_length} tokens, and the prompt has {length}: {count} "
                "more don't fit; shorten it or lower 'max_tokens'",
                name if left < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return count

    def _submit(self, jobs: list[Job]) -> tuple[asyncio.Queue, list[Ticket]]:
        loop, pieces, tickets = asyncio.get_running_loop(), asyncio.Queue(), []  # type: ignore[var-annotated]

        def deliver(index: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        try:
            for index, job in enumerate(jobs):
                tickets.append(self.engine.submit(job, functools.partial(deliver, index)))
        except Busy:
            for ticket in tickets:
                ticket.cancel()
            raise ApiError(
                "the server has as many requests as it takes: try again in a moment",
                status=503,
                code="overloaded",
                retry_after=1,
            ) from None
        return pieces, tickets


def _count(ask: Ask) -> int:
    """Of choices."""
    return ask.n * (len(ask.prompt) if isinstance(ask, CompletionAsk) else 1)


def _check_type(request: Request) -> None:
    """Without it any page in a browser of this machine could post here: of JSON it has to ask first."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise ApiError("the body must be JSON, with 'Content-Type: application/json'", status=415)


async def _deltas(answer: Answer, pieces: asyncio.Queue, tickets: list[Ticket]) -> AsyncIterator[Any]:
    """What each piece adds to the answer, until every choice has ended."""
    left = len(tickets)
    while left:
        index, piece = await pieces.get()
        if answer.ended(index):
            continue  # by a stop sequence, before the engine knew
        if piece.finish in ("error", "cancelled"):
            message = "the model failed" if piece.finish == "error" else "the server is shutting down"
            raise ApiError(message, status=500 if piece.finish == "error" else 503)
        yield answer.add(index, piece)
        if answer.ended(index):
            tickets[index].cancel()
            left -= 1


async def _whole(answer: Answer, pieces: asyncio.Queue, tickets: list[Ticket]) -> dict[str, Any]:
    async for _ in _deltas(answer, pieces, tickets):
        pass
    return answer.whole()


async def _streamed(
    answer: Answer, pieces: asyncio.Queue, tickets: list[Ticket]
) -> AsyncIterator[dict[str, Any]]:
    try:
        for chunk in answer.opening():
            yield chunk
        async for chunk in _deltas(answer, pieces, tickets):
            if chunk is not None:
                yield chunk
        for chunk in answer.closing():
            yield chunk
    except ApiError as error:
        yield error.body


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(str(error.detail), status=error.status_code)
    return JSONResponse(told.body, error.status_code, error.headers)


async def _answer_fault(request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return JSONResponse(ApiError("the server failed", status=500).body, 500)
