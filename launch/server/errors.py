"""Errors as OpenAI's API words them."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client is told: an HTTP status and `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }
