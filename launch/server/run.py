"""Starting and stopping the server."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from core.errors import UserError
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
) -> Iterator[str]:
    """Serve from a thread of this process; yields the URL, such as `http://127.0.0.1:8000`.

    Port 0 takes a free one. At the end answers in the making are cut off.

    Raises:
        UserError: if the port is taken, or FastAPI is missing.
    """
    with listen(host, port) as listener, _engine(served, limits) as engine:
        server = _server(served, engine, limits, api_key)
        thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server ended before it answered")
                time.sleep(0.01)
            yield url_of(listener)
        finally:
            engine.close()
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _engine(served: Served, limits: Limits) -> Iterator[Any]:
    from llm.engine import Engine

    engine = Engine(
        served.config, served.params, dtype=served.dtype, max_rows=limits.rows, max_waiting=limits.waiting
    )
    started = time.monotonic()
    engine.warm_up()
    _log.info("compiled in %.1f s", time.monotonic() - started)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def _server(served: Served, engine: Any, limits: Limits, api_key: str | None) -> Any:
    try:
        import uvicorn

        from launch.server.app import make_app
        from launch.server.connections import ImpatientProtocol
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi", "starlette"):
            raise
        raise UserError(f"serving needs the package '{error.name}': pip install -e '.[serve]'") from None
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
