"""What is done with every request: who asks, a number for it, errors, counting."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.gateway.errors import ApiError, as_api_error
from shoal.gateway.http import CallerGone, header, json_bytes, send_in_time, send_whole
from shoal.gateway.keys import ANYBODY, Keys
from shoal.gateway.meter import Meter

logger = logging.getLogger(__name__)

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")

_COUNTED: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"})

PATH_CHARS_SHOWN: Final = 200
"""Of a path in the log."""

GONE: Final = 499
"""In logs and counts, as nginx has it: the caller left before the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """Who may ask for what."""

    keys: Keys
    guarded: Collection[str]
    """First parts of paths that need a key, if there are keys."""
    hosts: frozenset[str] | None
    """Host names that requests may use; None: any. A page of another site that calls itself
    by our address (DNS rebinding) has a name of its own."""


class Front:
    """An ASGI application before another one."""

    def __init__(self, inner: ASGIApp, config: FrontConfig, meter: Meter) -> None:
        self._inner = inner
        self._config = config
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return  # websockets: uvicorn answers 403
        await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked_s = asyncio.get_running_loop().time()
        scope["app"] = self  # a path that nobody knows is then an exception
        scope["shoal.request_id"] = request_id = _request_id(scope)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"], (b"x-request-id", request_id.encode()),
                    *_SAFETY,
                ]  # fmt: skip
            await send_in_time(send, message)

        try:
            self._check_origin(scope)
            scope["shoal.caller"] = self._caller(scope)
            await self._inner(scope, receive, sending)
        except CallerGone:
            status = GONE
        except Exception as error:  # noqa: BLE001 - the top: told to the caller, or logged
            await self._answer_error(error, scope, sending, has_begun=bool(status))
        finally:
            self._meter.requests.labels(_known(scope), str(status)).inc()
            logger.info(
                "request id=%s caller=%s path=%s status=%d duration_s=%.3f",
                request_id, getattr(scope.get("shoal.caller"), "name", ""), _shown(scope["path"]),
                status, asyncio.get_running_loop().time() - asked_s,
            )  # fmt: skip

    async def _answer_error(
        self, error: Exception, scope: Scope, send: Send, *, has_begun: bool
    ) -> None:
        if isinstance(error, HTTPException):
            what = {404: "no such path", 405: "this path takes another method"}
            detail = what.get(error.status_code, error.detail)
            error = ApiError(error.status_code, f"{scope['method']} {scope['path']}: {detail}")
        told = as_api_error(error, f"request {scope['shoal.request_id']}")
        if has_begun:
            return
        try:
            body = json_bytes(told.body())
            await send_whole(send, body, status=told.status, headers=told.headers())
        except CallerGone:
            return

    def _check_origin(self, scope: Scope) -> None:
        host = header(scope, "host") or ""
        name = _host_name(f"//{host}")
        if self._config.hosts is not None and name not in self._config.hosts:
            raise ApiError(403, f"this gateway is not {host!r}", code="wrong_host")
        origin = header(scope, "origin")
        if origin not in (None, "null") and _net_place(origin) == host:
            return
        if origin is not None:
            raise ApiError(403, f"pages of {origin} may not ask here", code="wrong_origin")

    def _caller(self, scope: Scope) -> Any:
        first = scope["path"].strip("/").partition("/")[0]
        if first not in self._config.guarded:
            return ANYBODY
        return self._config.keys.find(header(scope, "authorization"))


_SAFETY: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


def _request_id(scope: Scope) -> str:
    given = header(scope, "x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req_{secrets.token_hex(12)}"


def _host_name(url: str) -> str:
    """The host of a URL; empty: it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as an open bracket
        return ""


def _net_place(url: str) -> str | None:
    """Host and port of a URL; None: it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _shown(path: str) -> str:
    """A path for the log: strangers must not write lines of their own there."""
    shown = path[:PATH_CHARS_SHOWN].encode("unicode_escape").decode("ascii")
    return shown if len(path) <= PATH_CHARS_SHOWN else f"{shown}..."


def _known(scope: Scope) -> str:
    """The path, for counting: strangers must not make up names of counters."""
    path: str = scope["path"]
    return path if path in _COUNTED else "other"


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
