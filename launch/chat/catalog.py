"""Which models there are: what the servers list, and who of them doesn't answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from launch.chat.client import Model, Server, ServerError, list_models

_FRESH_SECONDS = 2.0  # pages ask often, and all of them ask for the same


class Catalog:
    """The models of some servers. Those of a server that went away stay listed until it is back."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(dict.fromkeys(servers))
        places = Counter(server.place for server in self._servers)
        # Two behind one gateway are told apart by their paths alone.
        self._places = {
            server: server.place + (urlsplit(server.url).path if places[server.place] > 1 else "")
            for server in self._servers
        }
        self._models: dict[Server, list[Model]] = {}
        self._troubles: dict[Server, str] = {}
        self._asked = -_FRESH_SECONDS
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Ask all servers, unless that was done just now."""
        async with self._lock:
            if time.monotonic() - self._asked < _FRESH_SECONDS:
                return
            await asyncio.gather(*map(self._ask, self._servers))
            self._asked = time.monotonic()

    async def _ask(self, server: Server) -> None:
        try:
            self._models[server] = await list_models(server)
            self._troubles.pop(server, None)
        except ServerError as error:
            self._troubles[server] = str(error)

    @property
    def names(self) -> list[str]:
        """What a reader chooses from: a model's name, with its server's place where there are several."""
        return [self._name(server, model) for server, model in self._all()]

    @property
    def troubles(self) -> list[str]:
        """A sentence for each server that doesn't answer as it should."""
        return [self._troubles[server] for server in self._servers if server in self._troubles]

    def find(self, name: str | None) -> tuple[Server, Model]:
        """The server and the model of a name, or the first. Raises `ServerError` where there is none."""
        for server, model in self._all():
            if name in (None, self._name(server, model)):
                return server, model
        raise ServerError(" ".join(self.troubles) or "Choose a model first.")

    async def chosen(self, name: str | None) -> tuple[Server, Model]:
        """As `find`, for a reader who may have been quicker than the list of models."""
        if name is None:
            await self.refresh()
        return self.find(name)

    def _all(self) -> Iterator[tuple[Server, Model]]:
        for server in self._servers:
            for model in self._models.get(server, ()):
                yield server, model

    def _name(self, server: Server, model: Model) -> str:
        return model.name if len(self._servers) == 1 else f"{model.name} @ {self._places[server]}"
