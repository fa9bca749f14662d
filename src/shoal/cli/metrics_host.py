"""What `shoal serve --metrics` adds: a page for Prometheus, on this machine by default."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.base.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from shoal.client.head_service import HeadService
    from shoal.net.metering import MeteredTransport
    from shoal.server.server import Server

logger = logging.getLogger(__name__)

NEEDS = "--metrics needs the extra `gateway`: pip install 'shoal[gateway]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerParts:
    """What is read."""

    server: Server
    transport: MeteredTransport
    heads: HeadService | None


def parse_where(text: str) -> tuple[str, int]:
    """HOST:PORT, or :PORT for this machine alone.

    Raises:
        ConfigError: malformed, or a library is missing.
    """
    try:
        from shoal.gateway.listening import parse_listen
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    given = f"127.0.0.1{text}" if text.startswith(":") else text
    try:
        return parse_listen(given)
    except ConfigError as error:
        raise ConfigError(f"--metrics {text!r}: write HOST:PORT, or :PORT") from error


@asynccontextmanager
async def serving_metrics(where: tuple[str, int], parts: ServerParts) -> AsyncIterator[str]:
    """Answer at /metrics inside the context; gives the URL.

    Raises:
        ConfigError: the address can't be had.
    """
    try:
        from prometheus_client import CollectorRegistry  # noqa: F401 - the meter needs it

        from shoal.gateway.http import send_whole
        from shoal.gateway.listening import Listening, serving
        from shoal.server.meter import CONTENT_TYPE, ServerMeter
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    clock = asyncio.get_running_loop().time
    meter = ServerMeter(parts.server, parts.transport.traffic, clock, parts.heads)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] != "/metrics" or scope["method"] != "GET":
            await send_whole(send, b"GET /metrics\n", status=404, kind="text/plain")
            return
        await send_whole(send, meter.text(), kind=CONTENT_TYPE)

    async with serving(app, Listening(host=where[0], port=where[1])) as url:
        logger.info("metrics url=%s/metrics", url)
        yield url
