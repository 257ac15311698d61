"""Answers in OpenAI's shapes, whole or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from launch.server.model import Served
from launch.server.protocol import Ask, ChatAsk, CompletionAsk
from launch.server.text import Choice, Places, TokenNames
from llm.engine import Piece, Token
from llm.generate import text_of


class Prompt(NamedTuple):
    text: str | None  # None where it came as ids, or as messages
    ids: list[int]


class Answer:
    """The choices of one request, `n` for each prompt, and what they have so far."""

    prefix: str
    kinds: tuple[str, str]  # of the whole answer, and of a chunk

    def __init__(self, served: Served, ask: Ask, prompts: list[Prompt]):
        self.served, self.ask, self.prompts = served, ask, prompts
        count = len(prompts) * ask.n
        self.choices = [Choice(served.tokenizer, ask.stop) for _ in range(count)]
        self.texts = [""] * count
        self.tokens: list[list[Token | int]] = [[] for _ in range(count)]
        self.names = TokenNames(served.tokenizer)
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def ended(self, index: int) -> bool:
        return self.choices[index].finish is not None

    def add(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Take a piece; the chunk that it makes, or None if there is nothing new to see."""
        choice = self.choices[index]
        before = self._begin(index, piece)
        text, tokens = choice.add(piece)
        text, shown = before[0] + text, [*before[1], *tokens]
        self.texts[index] += text
        self.tokens[index] += shown
        if not self.ask.stream or not (text or choice.finish or (shown and self._wants_logprobs)):
            return None
        return self._chunk([self._part(index, text, shown)])

    def opening(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def closing(self) -> Iterator[dict[str, Any]]:
        if self.ask.include_usage:
            yield self._envelope(1) | {"choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(len(self.choices))]
        return self._envelope(0) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        new = sum(choice.count for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    @property
    def _wants_logprobs(self) -> bool:
        asked = self.ask.logprobs  # type: ignore[attr-defined]
        return asked is not None and asked is not False  # 0 asks for those of the tokens drawn

    def _envelope(self, kind: int) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.kinds[kind],
            "created": self._created,
            "model": self.served.name,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.ask.include_usage:
            return self._envelope(1) | {"choices": choices}
        so_far = self.usage() if self.ask.stream_options.continuous_usage_stats else None  # type: ignore[union-attr]
        return self._envelope(1) | {"choices": choices, "usage": so_far}

    def _begin(self, index: int, piece: Piece) -> tuple[str, list[Token | int]]:
        """Text and tokens that come before those drawn."""
        return "", []

    def _part(self, index: int, text: str, tokens: list[Token | int]) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    prefix, kinds = "cmpl", ("text_completion", "text_completion")
    ask: CompletionAsk

    def __init__(self, served: Served, ask: Ask, prompts: list[Prompt]):
        super().__init__(served, ask, prompts)
        self._places = [Places(served.tokenizer) for _ in self.choices]

    def _begin(self, index: int, piece: Piece) -> tuple[str, list[Token | int]]:
        if not self.ask.echo or self.choices[index].count or self.texts[index]:
            return "", []
        prompt = self.prompts[index // self.ask.n]
        text = text_of(self.served.tokenizer, prompt.ids) if prompt.text is None else prompt.text
        return text, [] if piece.prompt is None else [prompt.ids[0], *piece.prompt]

    def _part(self, index: int, text: str, tokens: list[Token | int]) -> dict[str, Any]:
        logprobs = self.names.completion(tokens, self._places[index]) if self._wants_logprobs else None
        finish = self.choices[index].finish
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _choice(self, index: int) -> dict[str, Any]:
        return self._part(index, self.texts[index], self.tokens[index])


class ChatAnswer(Answer):
    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")
    ask: ChatAsk

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.choices)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _part(self, index: int, text: str, tokens: list[Token | int]) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta} | self._rest(index, tokens)

    def _choice(self, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.texts[index], "refusal": None}
        return {"index": index, "message": message} | self._rest(index, self.tokens[index])

    def _rest(self, index: int, tokens: list[Token | int]) -> dict[str, Any]:
        content = [self.names.chat(token) for token in tokens if isinstance(token, Token)]
        logprobs = {"content": content, "refusal": None} if self._wants_logprobs else None
        return {"logprobs": logprobs, "finish_reason": self.choices[index].finish}
