"""Talking to OpenAI-compatible servers: streams that end when told to, and failures as sentences."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from core.errors import UserError
from launch.address import is_loopback

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 600.0  # a busy server may let a request wait for its turn
_LIST_SECONDS = 5.0
_LONGEST_DETAIL = 240  # characters of a server's own words that are shown


class ServerError(Exception):
    """What went wrong with a server, as a sentence for the page."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: `url` up to `/v1`, and the key it asks for, if any."""

    url: str
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Server:
        """The server at a URL as a user writes it, with `/v1` or without. Raises `UserError` for no URL."""
        try:
            parts = urlsplit(url.strip())
            bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:
            bad = True
        if bad:
            raise UserError(f"--url {url}: give the address of a server, such as http://127.0.0.1:8000")
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        return cls(base if parts.path.strip("/") else f"{base}/v1", key)

    @property
    def place(self) -> str:
        """Host and port, by which people tell servers apart."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent there: it goes by TLS, or stays on this machine."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or is_loopback(parts.hostname or "")


class Model(NamedTuple):
    """A model as its server calls it, and by whom it is served, in the server's words."""

    name: str
    owner: str = ""

    @property
    def counts(self) -> bool:
        """Whether the server can tell in each chunk how many tokens there are so far; others refuse to."""
        return self.owner in ("token-to-tensor", "vllm")


async def list_models(server: Server) -> list[Model]:
    """The models that a server has. Raises `ServerError`."""
    with _telling(server):
        async with _client(server, _LIST_SECONDS) as client:
            response = await client.get(f"{server.url}/models")
        answer = _answer(server, response, model="")
    models = answer.get("data")
    if not isinstance(models, list):
        raise ServerError(foreign(server))
    return [
        Model(model["id"], str(model.get("owned_by", "")))
        for model in models
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    ]


async def post(server: Server, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The server's whole answer. Raises `ServerError`."""
    with _telling(server):
        async with _client(server, _READ_SECONDS) as client:
            response = await client.post(f"{server.url}/{path}", json=body)
        return _answer(server, response, body["model"])


async def stream(server: Server, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed answer, as they come.

    Closing the iterator or cancelling its task closes the connection, by which the server knows that it can
    stop. Raises `ServerError`, also for what goes wrong in the middle.
    """
    with _telling(server):
        async with (
            _client(server, _READ_SECONDS) as client,
            client.stream("POST", f"{server.url}/{path}", json=body) as response,
        ):
            if response.is_error:
                await response.aread()
                _answer(server, response, body["model"])
            if "event-stream" not in response.headers.get("content-type", ""):
                raise ServerError(foreign(server))
            async for data in _events(response.aiter_bytes()):
                if data == "[DONE]":
                    return
                chunk = _parsed(data)
                if chunk is None:
                    raise ServerError(foreign(server))
                if chunk.get("error"):
                    raise ServerError(refusal(server.place, 500, chunk, body["model"]))
                yield chunk
    raise ServerError(_broken_off(server.place))


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of server-sent events, a line each.

    httpx's own lines end at U+2028 too, which JSON may hold as it is.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode("utf-8", "replace")


@asynccontextmanager
async def _client(server: Server, seconds: float | int) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    timeout = httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
    # A proxy of the environment is for the world outside: behind it, this machine's loopback is another's.
    outside = not is_loopback(urlsplit(server.url).hostname or "")
    async with httpx.AsyncClient(
        headers=headers, timeout=timeout, trust_env=outside, verify=_certificates()
    ) as client:
        yield client


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


@contextmanager
def _telling(server: Server) -> Iterator[None]:
    """Turns httpx's failures into `ServerError`s."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise ServerError(failure(server.place, error)) from None


def failure(place: str, error: Exception) -> str:
    """What a failed connection means, as a sentence."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"{place} can't be reached: nothing answered within {_CONNECT_SECONDS:.0f} seconds."
    if isinstance(error, httpx.ConnectError):
        if "CERTIFICATE" in str(error).upper():
            return f"The certificate of {place} isn't one that this machine trusts."
        if "name" in str(error).lower() and "known" in str(error).lower():
            return f"No machine is known by the name in {place}: look for a slip in the URL."
        return f"No server answers at {place}: start it, or wait until it is up."
    if isinstance(error, httpx.TimeoutException):
        return f"The server at {place} took too long to answer: it may be busy; try again."
    if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)):
        return _broken_off(place)
    return f"The server at {place} can't be talked to: look for a slip in the URL."


def _broken_off(place: str) -> str:
    return f"The server at {place} broke off before the answer was complete: it may have stopped."


def foreign(server: Server) -> str:
    """What an answer of another form than OpenAI's means, as a sentence."""
    return f"What answers at {server.place} is no OpenAI-compatible server: look for a slip in the URL."


def _answer(server: Server, response: httpx.Response, model: str) -> dict[str, Any]:
    """The object in a response. Raises `ServerError` where it is an error or something else."""
    content = _parsed(response.text)
    if response.is_error:
        wait = response.headers.get("retry-after", "")
        raise ServerError(refusal(server.place, response.status_code, content or {}, model, wait))
    if content is None:
        raise ServerError(foreign(server))
    return content


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def refusal(place: str, status: int, body: Mapping[str, Any], model: str, wait: str = "") -> str:
    """What a server's error means, as a sentence.

    Args:
        status: the HTTP status.
        body: what the server sent: `{"error": {"message": ...}}` as OpenAI does, or `{"message": ...}` or
            `{"detail": ...}` as others do.
        model: the one that was asked for.
        wait: the header `Retry-After`.
    """
    said = _said(body)
    lower = said.lower()
    if status in (401, 403):
        return f"The server at {place} refuses the key: start this page with the right one (--api-key)."
    if status == 404 and model and (model.lower() in lower or "model" in lower):
        return f"The server at {place} has no model {model}: choose another."
    if status in (404, 405):
        return f"The server at {place} doesn't offer this: look for a slip in the URL.{_quoted(said)}"
    if status == 413 or (status < 500 and _is_length(lower)):
        return (
            "This is too long for the model's context: clear the chat, shorten the text, or lower "
            f"“Max new tokens”.{_quoted(said)}"
        )
    if status in (429, 503):
        when = f"in {wait} seconds" if wait.isdigit() else "in a moment"
        return f"The server at {place} has too much to do: try again {when}.{_quoted(said)}"
    if status >= 500:
        return f"The server at {place} failed at this request: its log says why.{_quoted(said)}"
    return f"The server at {place} refuses the request.{_quoted(said)}"


def _is_length(said: str) -> bool:
    """Whether a refusal is about the context: OpenAI's words and ours, or vLLM's for too many new tokens."""
    of_context = "context" in said and ("length" in said or "tokens" in said)
    return of_context or "max_model_len" in said


def _said(body: Mapping[str, Any]) -> str:
    """A server's own words in one line; none where they are data or a traceback rather than words."""
    error = body.get("error")
    said = error.get("message") if isinstance(error, Mapping) else error
    said = said or body.get("message") or body.get("detail")
    if isinstance(said, Sequence) and said and isinstance(said[0], Mapping):
        said = said[0].get("msg")  # of pydantic's
    if not isinstance(said, str) or "Traceback" in said:
        return ""
    line = " ".join(said.split())
    return "" if any(mark in line for mark in ("{", "<html", "[{")) else line


def _quoted(said: str) -> str:
    if not said:
        return ""
    cut = said if len(said) <= _LONGEST_DETAIL else said[: _LONGEST_DETAIL - 1].rstrip() + "…"
    return f" It says: {cut if cut.endswith(('.', '!', '?', '…')) else cut + '.'}"
