"""The socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from shoal.base.errors import ConfigError
from shoal.gateway.closing import Closing
from shoal.gateway.connection import TimedConnection

CONNECTIONS_MAX: Final = 1024
"""Open at a time; further ones are answered 503."""

HEADERS_BYTES_MAX: Final = 64 << 10
"""Of one request."""

KEEP_ALIVE_S: Final = 75
"""An idle connection lives so long."""

FAREWELL_S: Final = 0.5
"""Answers that are being written when the gateway stops get so long; then readers are told."""

CUT_OFF_S: Final = 0.9
"""Who has not read that by then is cut off."""

UNSENT_BYTES: Final = 128 << 10
"""What the system takes of an answer before its reader does. Left alone it would be megabytes
for each reader that reads nothing."""

BACKLOG: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where to listen, and how."""

    host: str
    port: int
    """0: any that is free."""
    certificate: Path | None = None
    """With a key: HTTPS."""
    key: Path | None = None


def parse_listen(text: str) -> tuple[str, int]:
    """HOST:PORT, or [V6]:PORT.

    Raises:
        ConfigError: malformed.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"--listen {text!r}: write HOST:PORT, such as 127.0.0.1:8000")
    return host, int(port)


class _Server(uvicorn.Server):
    """Leaves the signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(
    app: ASGIApp, listening: Listening, closing: Closing | None = None
) -> AsyncIterator[str]:
    """Serve inside the context; gives the URL. At its end `closing` ends the answers at work.

    Raises:
        ConfigError: the address is taken or not ours, or the certificate is no good.
    """
    bound = _bind(listening)
    scheme = "http" if listening.certificate is None else "https"
    try:
        config = uvicorn.Config(
            app,
            http=TimedConnection,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what went wrong with a request is in our own log
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            h11_max_incomplete_event_size=HEADERS_BYTES_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CUT_OFF_S,  # type: ignore[arg-type]  # it may be a float
            ssl_certfile=listening.certificate,
            ssl_keyfile=listening.key,
        )
        config.load()
    except (OSError, ValueError) as error:
        bound.close()
        raise ConfigError(f"can't use the certificate or its key: {error}") from error
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]), name="http")
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    try:
        yield f"{scheme}://{host}:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        ending = None
        if closing is not None:
            ending = asyncio.get_running_loop().call_later(FAREWELL_S, closing.end)
        await task
        if ending is not None:
            ending.cancel()


def _bind(listening: Listening) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_BYTES)
            bound.bind(address)
            bound.listen(BACKLOG)  # who comes before uvicorn runs, waits
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"can't listen on {listening.host}:{listening.port}: {error}; give another --listen"
        ) from error
    return bound
