"""A client's streams to one server: control, and rows from it.

Rows *to* the server travel over the client's `SenderPool`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from shoal.base.errors import (
    PeerTimeout,
    PeerUnreachable,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.link.pool import HEALTHY_S
from shoal.link.receiver import Answer, ReceiverEvents, RowReceiver
from shoal.net.channel import PURPOSE_CONTROL, PURPOSE_ROWS_IN, Channel
from shoal.net.tasks import TaskSet
from shoal.wire.directory import GetLoad, GetRecords, Publish
from shoal.wire.messages import (
    Alive,
    Broken,
    Close,
    ControlMessage,
    Error,
    Failed,
    GetHeld,
    Keep,
    Leaving,
    Ping,
    Room,
    Route,
)

logger = logging.getLogger(__name__)

Request = Route | Ping | GetRecords | Publish | GetLoad | GetHeld


class LinkEvents(ReceiverEvents, Protocol):
    """What the client wants to hear."""

    def on_broken(self, peer: PeerId, message: Broken) -> None:
        """A server can't reach its successor."""

    def on_failed(self, peer: PeerId, message: Failed) -> None:
        """A server can't go on with a session."""

    def on_leaving(self, peer: PeerId, message: Leaving) -> None:
        """A server will stop serving blocks."""

    def on_room(self, peer: PeerId, message: Room) -> None:
        """A server has room for a session of ours that waits in line."""

    def on_round_trip(self, peer: PeerId, rtt_s: float) -> None:
        """A Ping was answered after this long."""

    def sessions_at(self, peer: PeerId) -> list[bytes]:
        """Our sessions that run over this server now."""

    def on_server_lost(self, peer: PeerId, error: ShoalError) -> None:
        """The control stream or the rows from the server are gone for good."""


class ServerLink:
    """Streams to one server; dialled on first use and again when needed."""

    def __init__(
        self,
        peer: PeerId,
        dial: Callable[[PeerId, str], Awaitable[Channel]],
        events: LinkEvents,
    ) -> None:
        self.peer = peer
        self.pinged_s: float | None = None
        """Loop time of the oldest Ping without an answer."""
        self.alive: Alive | None = None
        """Its last sign of life."""
        self._dial = dial
        self._events = events
        self._control: Channel | None = None
        self._receiver: RowReceiver | None = None
        self._wants_rows = False
        self._is_redialling = False
        """Whether we closed the stream of rows ourselves, to dial a new one."""
        self._calls: dict[int, asyncio.Future[ControlMessage]] = {}
        self._next_call = itertools.count(1)
        self._connecting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._tasks = TaskSet(f"link {short(peer)}")

    @property
    def is_up(self) -> bool:
        """Whether the control stream stands."""
        return self._control is not None

    async def connect(self, *, rows: bool) -> None:
        """Make sure that the control stream, and if `rows` the stream of rows, stand.

        Raises:
            ShoalError: the server can't be reached, or does not want us.
        """
        async with self._connecting:
            if self._control is None:
                self._control = await self._dial(self.peer, PURPOSE_CONTROL)
                self.pinged_s = self.alive = None
                self.keep()
                self.ping(asyncio.get_running_loop().time())
                self._tasks.spawn(self._read_control(self._control), "control")
            if rows and not self._wants_rows:
                channel = await self._dial(self.peer, PURPOSE_ROWS_IN)
                self._wants_rows = True
                self._tasks.spawn(self._receive_rows(channel), "rows")

    async def request(self, make: Callable[[int], Request]) -> ControlMessage:
        """Send `make(call)` and return its answer, within CALL_TIMEOUT_S.

        Raises:
            ShoalError: the server's refusal, typed; PeerTimeout; PeerUnreachable.
        """
        call = next(self._next_call)
        future = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._send(lambda: make(call))
                answer: ControlMessage = await future
        except TimeoutError as error:
            raise PeerTimeout(
                f"peer {short(self.peer)} did not answer within {CALL_TIMEOUT_S} s"
            ) from error
        finally:
            self._calls.pop(call, None)
        if isinstance(answer, Error):
            raise error_from_code(answer.code, answer.detail, answer.retry_after_s)
        return answer

    def notify(self, message: Close | Ping) -> None:
        """Send without waiting for anything; lost when the stream is down."""
        if self._control is not None:
            self._tasks.spawn(self._try_send(lambda: message), "notify")

    def ping(self, now_s: float) -> None:
        """Ask for a sign of life."""
        if self.pinged_s is None:
            self.pinged_s = now_s
        self.notify(Ping(0))

    def keep(self) -> None:
        """List our sessions: the server frees what is not among them."""
        if self._control is not None:
            self._tasks.spawn(
                self._try_send(lambda: Keep(self._events.sessions_at(self.peer))), "keep"
            )

    def post(self, answer: Answer) -> None:
        """Answer on the stream of rows from this server."""
        if self._receiver is not None:
            self._receiver.post(answer)

    def redial_rows(self, silent_s: float) -> None:
        """Rows don't come though they should: a stream this long silent is dialled anew."""
        now_s = asyncio.get_running_loop().time()
        if self._receiver is not None and now_s - self._receiver.heard_s >= silent_s:
            self._is_redialling = True
            self._receiver.close()

    def drop(self) -> None:
        """Close all streams; the next `connect` dials anew."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
        self._fail_calls(PeerUnreachable(f"peer {short(self.peer)} was given up"))

    async def close(self) -> None:
        """Close all streams for good."""
        if self._control is not None:
            self._control.close()
        await self._tasks.close()

    async def _send(self, make: Callable[[], Request | Close | Keep]) -> None:
        """Send what `make` returns when it is its turn (a Keep must not be out of date)."""
        async with self._sending:
            if self._control is None:
                raise PeerUnreachable(f"no control stream to peer {short(self.peer)}")
            await self._control.send(make())

    async def _try_send(self, make: Callable[[], Request | Close | Keep]) -> None:
        try:
            await self._send(make)
        except PeerUnreachable:
            logger.debug("not sent, stream is down peer=%s", short(self.peer))

    async def _read_control(self, channel: Channel) -> None:
        error: ShoalError = PeerUnreachable(f"peer {short(self.peer)} closed its control stream")
        try:
            while True:
                message, _ = await channel.receive()
                self._on_control(message)
        except ShoalError as failure:
            error = failure
        finally:
            channel.close()
            if self._control is channel:
                self._control = None
                self._fail_calls(error)
                self._events.on_server_lost(self.peer, error)

    def _on_control(self, message: object) -> None:
        if isinstance(message, Alive) and self.pinged_s is not None:
            rtt_s = asyncio.get_running_loop().time() - self.pinged_s
            self._events.on_round_trip(self.peer, rtt_s)
        self.pinged_s = None
        match message:
            case Broken():
                self._events.on_broken(self.peer, message)
            case Failed():
                self._events.on_failed(self.peer, message)
            case Room():
                self._events.on_room(self.peer, message)
            case Leaving():
                self._events.on_leaving(self.peer, message)
            case Alive():
                self.alive = message
                self._resolve(message)
            case Error(call=0):
                raise error_from_code(message.code, message.detail, message.retry_after_s)
            case _:
                self._resolve(message)

    def _resolve(self, message: object) -> None:
        future = self._calls.get(getattr(message, "call", 0))
        if future is not None and not future.done():
            future.set_result(message)  # type: ignore[arg-type]

    def _fail_calls(self, error: ShoalError) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(PeerUnreachable(error.detail))

    async def _receive_rows(self, channel: Channel) -> None:
        """Receive rows; a stream that breaks is dialled again unless it breaks too often."""
        now = asyncio.get_running_loop().time
        error: ShoalError = PeerUnreachable(f"peer {short(self.peer)} sends no rows")
        broke_at = -HEALTHY_S
        try:
            while True:
                self._receiver = RowReceiver(channel, self._events)
                try:
                    await self._receiver.run()
                except ShoalError as failure:
                    error = failure
                self._receiver = None
                if self._control is None:
                    return
                if not self._is_redialling:
                    if now() - broke_at < HEALTHY_S:
                        return
                    broke_at = now()
                self._is_redialling = False
                channel = await self._dial(self.peer, PURPOSE_ROWS_IN)
        except ShoalError as failure:
            error = failure
        finally:
            self._receiver = None
            self._wants_rows = False
            self._events.on_server_lost(self.peer, error)
