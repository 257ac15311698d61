r"""How a text is split into pieces before any pair is merged: no token ever crosses a piece.

The engine of `tokenizer.json` splits with Oniguruma; here the `regex` package does, and the standard
library's `re`, twice as fast, where a text is plain ASCII. All three give the same pieces on every text,
which a test holds over all of Unicode. One difference has to be bridged: `regex` knows newer letters and
numerals than the engine, to which they are unassigned, thus symbols. `_NEWER` lists them.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

import regex

from core.errors import UserError

PATTERNS = {
    # openai/gpt-2, src/encoder.py
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # meta-llama/llama3, llama/tokenizer.py
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

_NEWER_SPANS = """
    558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d 107bb-107bf
    10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb 11de0-11de9 11df1 1246f 12475-1247f
    12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2
    18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff
    1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e
    2cea2-2cead 323b0-33479 3d000-3fc3f
"""
_NEWER = re.compile(
    "["
    + "".join(re.sub("[0-9a-f]+", lambda code: chr(int(code[0], 16)), span) for span in _NEWER_SPANS.split())
    + "]"
)
_SYMBOL = "\uffff"  # no letter, numeral or space in any version of Unicode


@functools.cache
def splitter(pattern: str) -> Callable[[str], list[str]]:
    """The function that splits a text into pieces whose concatenation is the text.

    Args:
        pattern: a name in `PATTERNS`.

    Raises:
        UserError: for an unknown name.
    """
    if pattern not in PATTERNS:
        raise UserError(f"unknown split pattern {pattern!r}; valid: {', '.join(PATTERNS)}")
    unicode = regex.compile(PATTERNS[pattern]).findall
    ascii = re.compile(_ascii_twin(PATTERNS[pattern])).findall

    def split(text: str) -> list[str]:
        if text.isascii():
            return ascii(text)
        if not _NEWER.search(text):
            return unicode(text)
        pieces, start = [], 0
        for masked in unicode(_NEWER.sub(_SYMBOL, text)):
            pieces.append(text[start : start + len(masked)])
            start += len(masked)
        return pieces

    return split


def cut_before(text: str, end: int, start: int = 0) -> int:
    """The last place in `text[start:end]` where it may be cut without changing a piece; `start` if none.

    In both patterns a letter before anything but a letter ends its piece, whatever stands around the two.
    Python's Unicode tables have a version of their own: only what they all agree on is taken as either.
    """
    for at in range(min(end, len(text) - 1), start, -1):
        letter = text[at - 1].isalpha() and not _NEWER.match(text[at - 1])
        if letter and unicodedata.category(text[at]) in ("Zs", "Cc", "Po"):
            return at
    return start


def _ascii_twin(pattern: str) -> str:
    """`pattern` with its Unicode classes narrowed to ASCII, in the dialect of `re`.

    `re` would count the separators 0x1c to 0x1f among the spaces; Unicode's White_Space doesn't.
    """
    classes = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\s": "\t-\r ", r"\S": "^\t-\r "}

    def narrow(match: re.Match) -> str:
        found = match[0]
        if not found.startswith("["):
            return f"[{classes[found]}]"
        for name, members in classes.items():
            found = found.replace(name, members)
        return found

    return re.sub(r"\[[^]]*\]|\\p\{[LN]\}|\\[sS]", narrow, pattern)
