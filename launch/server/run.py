"""Starting and stopping the server."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from core.errors import require
from launch.address import listen, url_of
from launch.server.limits import Limits
from launch.server.model import Served

_log = logging.getLogger("launch.server")


@contextlib.contextmanager
def running(
    served: Served,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Serve from a thread of this process; yield the URL, such as `http://127.0.0.1:8000`, and what tells why
    the server ended, None while it runs.

    Port 0 takes a free one. At the end answers in the making are cut off.

    Raises:
        UserError: if the port is taken, the API key is empty, or FastAPI is missing.
    """
    check_installed()
    with listen(host, port) as listener, contextlib.closing(_engine(served, limits)) as engine:
        server = _server(served, engine, limits, api_key)
        began = time.monotonic()
        engine.warm_up()
        _log.info("compiled in %.1f s", time.monotonic() - began)
        engine.start()
        thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
        thread.start()

        def ended() -> str | None:
            if not engine.alive:
                return "the engine has ended: its thread's last words are above"
            return None if thread.is_alive() else "the server has ended: its thread's last words are above"

        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server ended before it answered")
                time.sleep(0.01)
            yield url_of(listener), ended
        finally:
            engine.close()
            server.should_exit = True
            thread.join()


def check_installed() -> None:
    """Raises UserError if FastAPI or Uvicorn is missing."""
    require("serve", "fastapi", "uvicorn")


def _engine(served: Served, limits: Limits) -> Any:
    from llm.engine import Engine

    return Engine(
        served.config, served.params, dtype=served.dtype, max_rows=limits.rows, max_waiting=limits.waiting
    )


def _server(served: Served, engine: Any, limits: Limits, api_key: str | None) -> Any:
    import uvicorn

    from launch.server.app import make_app
    from launch.server.connections import ImpatientProtocol

    protocol = type("Protocol", (ImpatientProtocol,), {"seconds": limits.body_seconds})
    return uvicorn.Server(
        uvicorn.Config(
            make_app(served, engine, limits, api_key),
            http=protocol,
            ws="none",
            log_level="warning",
            lifespan="off",
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=5,
        )
    )
