"""Connections that do nothing: each holds a socket, and there are only so many."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol


class ImpatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, less patient: it gives a request's head `seconds` to come, not all time there is,
    and as long again to a client that doesn't read the rest of an answer that was cut off.
    """

    seconds = 30.0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._seen: object = self.cycle
        self._timer = self.loop.call_later(self.seconds, self._look)

    def connection_lost(self, exc) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing() or (idle and self.cycle is self._seen):
            self.transport.abort()
            return
        self._seen = self.cycle if idle else None
        self._timer = self.loop.call_later(self.seconds, self._look)
