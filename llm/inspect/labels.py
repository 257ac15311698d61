"""Tokens as words that a picture can show."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.font_manager import findfont, get_font

from llm.tokenizer.tokenizer import Tokenizer
from llm.tokenizer.visible import visible

FONT = "DejaVu Sans Mono"  # comes with matplotlib, so a picture is the same everywhere


def token_labels(
    tokenizer: Tokenizer, ids: Sequence[int] | Int[np.ndarray, " S"], longest: int = 12
) -> list[str]:
    """Each token as one printable word, cut to `longest` characters; what the font lacks is escaped."""
    return [_label(tokenizer, int(i), longest) for i in ids]


def _label(tokenizer: Tokenizer, token: int, longest: int) -> str:
    text = visible(tokenizer.token_bytes(token)) or f"[{token}]"
    text = "".join(char if _font().get_char_index(ord(char)) else _escaped(char) for char in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


@functools.cache
def _font():
    return get_font(findfont(FONT))
