"""What a model gives each token of a text: from a server's log-probabilities, or from an inspection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.chat.client import Server, ServerError, post
from launch.chat.look import as_text
from llm.tokenizer.visible import visible

if TYPE_CHECKING:
    from llm.inspect.lens import Inspection
    from llm.tokenizer.tokenizer import Tokenizer

SHOWN = 5  # likeliest tokens at each place; servers often allow no more
Guesses = list[tuple[str, float]]  # token and probability, the likeliest first


class Token(NamedTuple):
    """A token as a label, its probability after those before it (None for the first), and the likeliest."""

    label: str
    probability: float | None
    likeliest: Guesses


class Reading(NamedTuple):
    """A text's tokens, and what would follow it."""

    tokens: list[Token]
    following: Guesses


def reading_of(inspection: Inspection, tokenizer: Tokenizer) -> Reading:
    """The reading of a text that a model was run over."""

    def label(token: int) -> str:
        return visible(tokenizer.token_bytes(token)) or f"[{token}]"

    guesses = [
        [(label(int(t)), float(p)) for t, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(inspection.next_tokens, inspection.next_probabilities, strict=True)
    ]
    tokens = [Token(label(int(inspection.tokens[0])), None, [])]
    for token, nats, likeliest in zip(inspection.tokens[1:], inspection.surprisal, guesses, strict=False):
        tokens.append(Token(label(int(token)), math.exp(-float(nats)), likeliest[:SHOWN]))
    return Reading(tokens, guesses[-1])


async def ask(server: Server, model: str, text: str) -> Reading:
    """The reading by a server's model. Raises `ServerError`, also where it can't echo a prompt's."""
    body = {
        "model": model,
        "prompt": text,
        "echo": True,
        "logprobs": SHOWN,
        "max_tokens": 1,
        "temperature": 0,
    }
    answer = await post(server, "completions", body)
    try:
        reading = _echoed(answer["choices"][0]["logprobs"])
    except (LookupError, TypeError, AttributeError, OverflowError):
        reading = None
    if reading is None:
        raise ServerError(f"The server at {server.place} gives no probabilities of a prompt's tokens.")
    return reading


def _echoed(logprobs: Mapping[str, Any]) -> Reading | None:
    """OpenAI's `logprobs` of an echoed prompt and one token after it."""
    labels, values = logprobs["tokens"], logprobs["token_logprobs"]
    tops = [_guesses(top) for top in logprobs["top_logprobs"]]
    if not len(labels) == len(values) == len(tops) or len(labels) < 2:
        return None
    tokens = [
        Token(visible(label.encode()), None if value is None else math.exp(value), top)
        for label, value, top in zip(labels, values, tops, strict=True)
    ]
    return Reading(tokens[:-1], tops[-1])


def _guesses(top: Mapping[str, float] | None) -> Guesses:
    likeliest = sorted((top or {}).items(), key=lambda item: -item[1])[:SHOWN]
    return [(visible(label.encode()), math.exp(value)) for label, value in likeliest]


def as_html(reading: Reading) -> str:
    """A reading for the page: the text with each token on its probability's colour, then what would follow.

    All that comes from models and users is escaped.
    """
    known = [token.probability for token in reading.tokens if token.probability is not None]
    summary = ""
    if known:
        nats = -sum(math.log(max(p, 1e-30)) for p in known) / len(known)
        summary = (
            f"{len(reading.tokens)} tokens, {nats:.2f} nats a token (perplexity {math.exp(nats):,.1f}). "
            "Point at a token, or tap it, for what the model held likeliest there."
        )
    text = "".join(map(_token_html, reading.tokens))
    rows = "".join(map(_row_html, reading.tokens))
    return (
        f'<p class="t2t-note">{summary}</p>{_LEGEND}<div class="t2t-text">{text}</div>'
        f"<h3>What would follow</h3>{_bars_html(reading.following)}"
        "<details class='t2t-table'><summary>As a table</summary><table><thead><tr><th>token</th>"
        f"<th>probability</th><th>likeliest there</th></tr></thead><tbody>{rows}</tbody></table></details>"
    )


_LEGEND = '<p class="t2t-legend" aria-hidden="true">' + "".join(
    f'<span style="--shade:{shade:.2f}"></span>{label}'
    for shade, label in ((0, "≤ 0.1 %"), (1 / 3, "1 %"), (2 / 3, "10 %"), (1, "100 %"))
) + "</p>"  # fmt: skip


def _shade(probability: float) -> float:
    """From 0 (a thousandth or less) to 1, by the logarithm: most of a text's tokens are unlikely ones."""
    return max(0.0, 1 + math.log10(max(probability, 1e-3)) / 3)


def _token_html(token: Token) -> str:
    label = as_text(token.label)
    breaks = "<br>" * token.label.count("\\n")
    if token.probability is None:
        return f'<span class="t2t-first" title="the text begins here">{label}</span>{breaks}'
    said = f"{label}: {_percent(token.probability)}"
    card = f'<span class="t2t-card" role="tooltip"><b>{said}</b>{_bars_html(token.likeliest)}</span>'
    style = f'style="--shade:{_shade(token.probability):.2f}"'
    return f'<span class="t2t-token" tabindex="0" {style} aria-label="{said}">{label}{card}</span>{breaks}'


def _row_html(token: Token) -> str:
    share = "–" if token.probability is None else _percent(token.probability)
    likeliest = ", ".join(f"<code>{as_text(label)}</code> {_percent(p)}" for label, p in token.likeliest)
    return f"<tr><td><code>{as_text(token.label)}</code></td><td>{share}</td><td>{likeliest}</td></tr>"


def _bars_html(guesses: Sequence[tuple[str, float]]) -> str:
    return '<span class="t2t-bars">' + "".join(
        f'<span><code>{as_text(label)}</code><i style="--p:{p:.3f}"></i><span>{_percent(p)}</span></span>'
        for label, p in guesses
    ) + "</span>"  # fmt: skip


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.001 else "< 0.1 %"
