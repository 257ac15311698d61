"""What one client may ask of the server. Reading it needs nothing installed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a server takes on. Beyond it requests are refused, by 4xx or, for want of room, by 503."""

    rows: int = 32  # requests that are decoded at the same time
    waiting: int = 256  # and that wait for it
    choices: int = 64  # prompts x n of one request
    body_bytes: int = 4 << 20
    body_seconds: float | int = 30.0  # to send the body in, and the head before it
    request_seconds: float | int = 600.0  # from the body's end to the answer's
    connections: int = 1024
