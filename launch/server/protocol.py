"""What clients send: JSON read strictly, every field checked, nothing asked for passed over in silence."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from launch.server.errors import ApiError

_MAX_INT = 2**63
_DEPTH = 4  # of a part of a message, in `messages`
# Fields that change nothing here, whatever they say.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"}
# Fields of OpenAI's API, or of vLLM's, that this server lacks, with the values that ask for nothing.
LACKING: dict[str, list[Any]] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "logit_bias": [{}],
    "suffix": [""],
    "modalities": [["text"]],
    "min_p": [0],
    "use_beam_search": [False],
    "min_tokens": [0],
}

Float = Annotated[float, Field(allow_inf_nan=False)]
Text = str


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    return text


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False  # of vLLM's: the usage so far in each chunk, not in the last alone
    include_obfuscation: bool = False  # of OpenAI's, to hide lengths on the wire: there is none


class Ask(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, lt=_MAX_INT)
    temperature: Float = Field(1.0, ge=0, le=100)
    top_p: Float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=_MAX_INT)  # -1 or 0: all tokens
    n: int = Field(1, ge=1, lt=_MAX_INT)
    seed: int | None = Field(None, ge=-_MAX_INT, lt=_MAX_INT)
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > 4:
            raise ValueError("at most 4 stop sequences are taken")
        if not all(stops):
            raise ValueError("a stop sequence is empty")
        return [_encodable(stop) for stop in stops]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionAsk(Ask):
    """`POST /v1/completions`."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, lt=_MAX_INT)

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> list[str | list[int]]:
        """As a list of prompts."""
        is_ids = lambda x: isinstance(x, list) and all(type(i) is int for i in x)  # noqa: E731
        prompts = [value] if isinstance(value, str) or (value and is_ids(value)) else value
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("give text, a list of texts, token ids, or a list of lists of them")
        if all(isinstance(prompt, str) for prompt in prompts):
            if not all(prompts):
                raise ValueError("a prompt is empty")
            return [_encodable(prompt) for prompt in prompts]
        if all(map(is_ids, prompts)):
            return prompts
        raise ValueError("give text, a list of texts, token ids, or a list of lists of them")


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: str
    content: str | list[Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsk(Ask):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, lt=_MAX_INT)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, value: list[Message]) -> list[Message]:
        for message in value:
            _encodable(message.role)
            _encodable(message.text)
        return value


def read(body: bytes, kind: type[Ask]) -> Any:
    """A request of a kind from an HTTP body.

    Raises:
        ApiError: 400, naming what is wrong.
    """
    try:
        data = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON that can be read: {error}") from None
    if not isinstance(data, dict):
        raise ApiError("the body must be a JSON object")
    known = {}
    for name, value in data.items():
        if value is None or name in IGNORED:
            continue
        if name in kind.model_fields:
            known[name] = _without_nulls(value, _DEPTH) if name in ("messages", "stream_options") else value
        elif name not in LACKING:
            raise ApiError(f"'{_shown(name)}' is not a field of this request", _shown(name))
        elif not any(value == neutral for neutral in LACKING[name]):
            raise ApiError(f"'{name}' is not supported by this server: leave it out", name)
    try:
        ask = kind.model_validate(known)
    except ValidationError as error:
        raise _as_api_error(error) from None
    _check(ask)
    return ask


def _without_nulls(value: Any, depth: int) -> Any:
    """Without the fields that are `null`: clients leave fields out so, and send answers back with them."""
    if depth == 0:
        return value
    if isinstance(value, dict):
        return {name: _without_nulls(v, depth - 1) for name, v in value.items() if v is not None}
    return [_without_nulls(v, depth - 1) for v in value] if isinstance(value, list) else value


def _check(ask: Ask) -> None:
    if ask.stream_options is not None and not ask.stream:
        raise ApiError("'stream_options' is for 'stream': true", "stream_options")
    if isinstance(ask, ChatAsk):
        if ask.top_logprobs and not ask.logprobs:
            raise ApiError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
        if ask.max_completion_tokens is not None:
            ask.max_tokens = ask.max_completion_tokens
    if isinstance(ask, CompletionAsk) and ask.best_of not in (None, ask.n):
        raise ApiError("'best_of' other than 'n' is not supported by this server: leave it out", "best_of")
    if ask.max_tokens == 0 and not getattr(ask, "echo", False):
        raise ApiError("'max_tokens' must be at least 1, or 0 with 'echo'", "max_tokens")


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [place for place in first["loc"] if isinstance(place, int) or place.isidentifier()]
    name = str(places[0]) if places else None
    if first["type"] == "missing" and len(places) == 1:
        return ApiError(f"'{name}' is missing", name)
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in places).lstrip(".")
    return ApiError(f"'{where}': {first['msg'].removeprefix('Value error, ')}", name)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _shown(name: str) -> str:
    """A name of the client's, fit to be repeated."""
    return name[:64].encode(errors="replace").decode()
