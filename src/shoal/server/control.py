"""The control stream of one client: requests in, answers and bad news out.

Routes and closings are worked off in order by a task of their own, since opening a
session waits for the engine; everything else is answered at once, so that a Ping shows
whether the server lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection
from typing import Final, Protocol

from shoal.base.errors import (
    InternalError,
    PeerBusy,
    PeerTimeout,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, SessionId, short
from shoal.base.limits import KEEP_PERIOD_S
from shoal.net.channel import Channel, error_message
from shoal.net.tasks import first_failure
from shoal.wire.directory import GetLoad, GetRecords, Load, Publish
from shoal.wire.messages import (
    Alive,
    Close,
    ControlMessage,
    GetHeld,
    Keep,
    Message,
    Ping,
    Route,
    Routed,
)

logger = logging.getLogger(__name__)

OUTBOX_MAX: Final = 4096
"""Messages waiting for a client that doesn't read; beyond this the stream is closed."""

SILENCE_MAX_S: Final = 3 * KEEP_PERIOD_S
"""A client that doesn't even list its sessions for this long is gone without a farewell."""

RECORDS_WAITING_MAX: Final = 16
"""Answers waiting beyond which no more records are handed out: each may fill a header."""

ROUTES_WAITING_MAX: Final = 256
"""Routes and closings that wait for the engine, per client."""


class ControlEvents(Protocol):
    """Who answers."""

    async def route(self, sender: PeerId, message: Route) -> Routed:
        """Follow a route. Raises ShoalError to refuse."""

    def close_session(self, sender: PeerId, session: SessionId) -> None:
        """The owner is done with a session."""

    def keep_sessions(self, sender: PeerId, sessions: Collection[bytes]) -> None:
        """The owner knows of these sessions and no others."""

    def alive(self, call: int) -> Alive:
        """How the engine is doing."""

    def held(self, sender: PeerId, message: GetHeld) -> Routed:
        """How far a session of the sender has come here."""

    def load(self, call: int) -> Load:
        """How full the server is."""

    def directory_answer(self, message: GetRecords | Publish) -> ControlMessage:
        """Records asked for or handed over."""


class ControlLink:
    """One client's control stream, seen from the server."""

    def __init__(self, channel: Channel, events: ControlEvents) -> None:
        self.peer = channel.peer
        self.origin = channel.origin
        self._channel = channel
        self._events = events
        self._outbox: deque[Message] = deque()
        self._has_mail = asyncio.Event()
        self._routes: asyncio.Queue[Route | Close | Keep] = asyncio.Queue(ROUTES_WAITING_MAX)

    def post(self, message: Message) -> None:
        """Send soon; never waits. A client that doesn't read loses the stream."""
        if len(self._outbox) >= OUTBOX_MAX:
            logger.warning("client does not read its control stream peer=%s", short(self.peer))
            self._channel.close()
            return
        self._outbox.append(message)
        self._has_mail.set()

    def close(self) -> None:
        """End the stream."""
        self._channel.close()

    async def run(self) -> None:
        """Serve the stream until it breaks.

        Raises:
            PeerError, ProtocolError: why it ended.
        """
        try:
            await first_failure(self._read(), self._write(), self._follow_routes())
        except ProtocolError as error:
            await self._channel.refuse(error)
            raise
        finally:
            self._channel.close()

    async def _read(self) -> None:
        while True:
            message = await self._next()
            match message:
                case GetRecords() if len(self._outbox) >= RECORDS_WAITING_MAX:
                    busy = PeerBusy("read the answers that wait first", retry_after_s=1.0)
                    self.post(error_message(busy, message.call))
                case Route() | Close() | Keep():
                    self._enqueue(message)
                case Ping():
                    self.post(self._events.alive(message.call))
                case GetHeld():
                    self.post(self._events.held(self.peer, message))
                case GetLoad():
                    self.post(self._events.load(message.call))
                case GetRecords() | Publish():
                    self.post(self._answer_directory(message))
                case _:
                    raise ProtocolError(f"{type(message).__name__} on a control stream")

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(SILENCE_MAX_S):
                return (await self._channel.receive())[0]
        except TimeoutError as error:
            raise PeerTimeout(f"client {short(self.peer)} has gone silent") from error

    def _enqueue(self, message: Route | Close | Keep) -> None:
        if not self._routes.full():
            self._routes.put_nowait(message)
        elif isinstance(message, Route):
            busy = PeerBusy("too many routes at once", retry_after_s=1.0)
            self.post(error_message(busy, message.call))
        else:
            raise ProtocolError("routes and closings come faster than they can be followed")

    async def _write(self) -> None:
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while self._outbox:
                await self._channel.send(self._outbox.popleft())

    async def _follow_routes(self) -> None:
        while True:
            message = await self._routes.get()
            match message:
                case Close():
                    self._events.close_session(self.peer, SessionId(message.session))
                case Keep():
                    self._events.keep_sessions(self.peer, set(message.sessions))
                case Route():
                    self.post(await self._route(message))

    async def _route(self, message: Route) -> Message:
        try:
            return await self._events.route(self.peer, message)
        except ShoalError as error:
            return error_message(error, message.call)
        except Exception as error:
            logger.exception("route failed peer=%s", short(self.peer))
            return error_message(InternalError(repr(error)), message.call)

    def _answer_directory(self, message: GetRecords | Publish) -> Message:
        try:
            return self._events.directory_answer(message)
        except ShoalError as error:
            return error_message(error, message.call)
