"""From tokens to the text that a client gets: whole characters, nothing after a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm.engine import Piece, Token
from llm.generate import TextDecoder
from llm.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -inf


class StopText:
    """Passes text on until a stop sequence, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.stopped = False

    def add(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Choice:
    """One answer in the making."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._decoder, self._stop = TextDecoder(tokenizer), StopText(stops)
        self.finish: str | None = None
        self.count = 0  # tokens drawn

    def add(self, piece: Piece) -> tuple[str, list[Token]]:
        """The text that the client may see now, and the tokens that it gets log-probabilities of."""
        text = ""
        for number, token in enumerate(piece.tokens, 1):
            self.count += 1
            text += self._stop.add(self._decoder.add([token.id]))
            if self._stop.stopped:
                self.finish = "stop"
                return text, piece.tokens[:number]
        if piece.finish is not None:
            text += self._stop.add(self._decoder.end())
            text += "" if self._stop.stopped else self._stop.end()
            self.finish = "stop" if self._stop.stopped else piece.finish
        return text, piece.tokens


class Places:
    """The character of the text at which each token begins, one token after the other."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder, self._at = TextDecoder(tokenizer), 0

    def of(self, token: int) -> int:
        at = self._at
        self._at += len(self._decoder.add([token]))
        return at


class TokenNames:
    """How tokens are written in log-probabilities: part of a character as OpenAI does, `bytes:\\xe2\\x82`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, token: Token) -> dict[str, Any]:
        """An entry of chat's `logprobs.content`."""
        entry = self._entry(token.id, token.log_probability)
        return entry | {"top_logprobs": [self._entry(*pair) for pair in token.top]}

    def _entry(self, token: int, log_probability: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": self.text(token),
            "logprob": finite(log_probability),
            "bytes": [*data],
        }

    def completion(self, tokens: Sequence[Token | int], places: Places) -> dict[str, Any]:
        """Completions' `logprobs`; a bare id has none."""
        out: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token in tokens:
            number = token if isinstance(token, int) else token.id
            out["text_offset"].append(places.of(number))
            out["tokens"].append(self.text(number))
            if isinstance(token, int):
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
            else:
                pairs = [*token.top, (token.id, token.log_probability)]
                out["token_logprobs"].append(finite(token.log_probability))
                likeliest: dict[str, float] = {}
                for i, p in pairs:  # of tokens that are written alike the likelier
                    likeliest.setdefault(self.text(i), finite(p))
                out["top_logprobs"].append(likeliest)
        return out


def finite(log_probability: float) -> float:
    return max(_LOWEST, log_probability)  # of NaN too, in this order
