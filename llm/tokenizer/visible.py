"""How a token is shown to people."""

from __future__ import annotations


def visible(token: bytes) -> str:
    """A token as one printable word: a space as a dot, what doesn't print or isn't UTF-8 escaped."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token)
    return "".join("·" if char == " " else char if char.isprintable() else repr(char)[1:-1] for char in text)
