"""Bytes in and out: bodies within bounds, JSON, event streams, callers who leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
from starlette.types import Message, Receive, Scope, Send

from shoal.gateway.errors import ApiError

T = TypeVar("T")

BODY_S: Final = 30.0
"""A body that takes longer is a caller that only holds memory."""

WRITE_S: Final = 30.0
"""A reader that takes nothing for so long is gone: its session is needed elsewhere."""

COMMENT_S: Final = 10.0
"""A stream without an event for so long gets a comment: proxies and clients give up on silence
after half a minute or more, and long prompts and repairs take longer."""

BODIES_BYTES_MAX: Final = 256 << 20
"""Bodies of all requests that are being read or turned into tokens."""

STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy must not collect the stream
}

_encoder: Final = msgspec.json.Encoder()


class CallerGone(Exception):
    """Whoever asked has closed the connection, or reads nothing."""


class Bodies:
    """Reads bodies; all together take a bounded amount of memory."""

    def __init__(self, bytes_max: int, total_max: int = BODIES_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._total_max = total_max
        self._total = 0

    @asynccontextmanager
    async def held(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """One request's body, which counts while the context lasts.

        Raises:
            ApiError: 413: too long. 408: too slow. 503: too many at a time.
            CallerGone: it ended before its end.
        """
        declared = header(scope, "content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._bytes_max:
            raise self._too_long()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                is_whole = False
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CallerGone
                    part = message.get("body", b"")
                    size += len(part)
                    self._total += len(part)
                    self._check(size)
                    parts.append(part)
                    is_whole = not message.get("more_body", False)
        except BaseException as error:
            self._total -= size
            if isinstance(error, TimeoutError):
                raise ApiError(408, f"the body did not come within {BODY_S:g} s") from None
            raise
        try:
            yield b"".join(parts)
        finally:
            self._total -= size

    def _check(self, size: int) -> None:
        if size > self._bytes_max:
            raise self._too_long()
        if self._total > self._total_max:
            raise ApiError(
                503, "too much is being read at this moment: try again", retry_after_s=1.0
            )

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than {self._bytes_max} bytes, which no prompt for this "
            "model is", code="body_too_large",
        )  # fmt: skip


def header(scope: Scope, name: str) -> str | None:
    """A request's header; None: not sent."""
    wanted = name.encode("ascii")
    found = next((value for key, value in scope["headers"] if key == wanted), None)
    return None if found is None else found.decode("latin-1")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller leaves.

    Raises:
        CallerGone: it left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerGone
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return _encoder.encode(value)


async def send_whole(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    kind: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """A response that is all there."""
    fields = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
    await send_in_time(send, _start(status, fields))
    await send_in_time(send, {"type": "http.response.body", "body": body})


async def send_in_time(send: Send, message: Message) -> None:
    """Send one message.

    Raises:
        CallerGone: the reader takes nothing.
    """
    try:
        async with asyncio.timeout(WRITE_S):
            await send(message)
    except TimeoutError:
        raise CallerGone from None


class EventStream:
    """Server-sent events, as OpenAI streams. Comments fill pauses inside `kept_alive`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sending = asyncio.Lock()
        self._beating: asyncio.Future[None] | None = None
        self._clock = asyncio.get_running_loop().time
        self._sent_s = self._clock()
        self.is_open = False
        """Whether the status has gone out: errors must go into the stream."""
        self.may_open = False
        """Whether a long pause may send the status: the request is at work, not in a line."""

    async def open(self) -> None:
        """Send the status, unless it has gone out."""
        async with self._sending:
            await self._open()

    async def event(self, value: Any) -> None:
        """One object."""
        await self._write(b"data: " + json_bytes(value) + b"\n\n", has_more=True)

    async def close(self) -> None:
        """The end that clients wait for; many hang up at once, so nothing may be left to do."""
        await self._rest()
        await self._write(b"data: [DONE]\n\n", has_more=False)

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Send a comment whenever nothing else was sent for a while."""
        self._beating = asyncio.ensure_future(self._beat())
        try:
            yield
        finally:
            await self._rest()

    async def _rest(self) -> None:
        beating, self._beating = self._beating, None
        if beating is not None:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self) -> None:
        """What is wrong with the reader is seen with the next event."""
        while True:
            await asyncio.sleep(max(0.01, self._sent_s + COMMENT_S - self._clock()))
            if self._clock() - self._sent_s < COMMENT_S:
                continue
            if not self.may_open and not self.is_open:
                self._sent_s = self._clock()
                continue
            async with self._sending:
                await self._open()
                await self._body(b": still here\n\n", has_more=True)

    async def _open(self) -> None:
        if not self.is_open:
            self.is_open = True
            await send_in_time(self._send, _start(200, STREAM_HEADERS))

    async def _write(self, data: bytes, *, has_more: bool) -> None:
        async with self._sending:
            await self._body(data, has_more=has_more)

    async def _body(self, data: bytes, *, has_more: bool) -> None:
        self._sent_s = self._clock()
        message = {"type": "http.response.body", "body": data, "more_body": has_more}
        await send_in_time(self._send, message)


def _start(status: int, headers: Mapping[str, str]) -> Message:
    fields = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": fields}
