"""Where a server listens: sockets, and how their addresses are written."""

from __future__ import annotations

import ipaddress
import socket

from core.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        UserError: if the host is unknown, or the port can't be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: choose one from 0 (any that is free) to {2**16 - 1}")
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: no address is known by that name") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise UserError(
            f"can't listen on {host}, port {port}: {(error.strerror or 'it is refused').lower()}; choose "
            "another with --port (0: any that is free) or --host"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """As `http://127.0.0.1:8000`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
