"""A stream of frames on one asyncio transport.

A plain asyncio protocol rather than a StreamReader: bytes go from the socket into the
parser and out of the caller's buffers into TLS without another buffer in between.

A stream starts with raw bytes (the identity proof, `tcp.py`) and changes to frames for good
with `start_frames`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Final, cast

from shoal.base.errors import (
    InternalError,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.net.sent_rate import BURST_BYTES, SentRates, delivery_of
from shoal.wire.frames import Buffer, Frame, FrameParser, encode_frame

READ_AHEAD_BYTES: Final = 1 << 20
"""Frames that nobody has received yet may hold this much before reading stops: a few
hundred rows, so that the network is busy while the receiver works."""

FRAME_OVERHEAD_BYTES: Final = 256
"""What an empty frame costs in memory; keeps a flood of tiny frames inside READ_AHEAD_BYTES."""

RAW_BYTES_MAX: Final = 64 << 10
"""Bytes held before the peer has proved its identity."""

WRITE_BUFFER_BYTES: Final = 256 << 10
"""Unsent bytes above which `send` waits. Small, so that a late frame is not behind much."""

WRITE_SLICE_BYTES: Final = 256 << 10
"""Big payloads are encrypted piece by piece, as the socket takes them."""

JOIN_BYTES_MAX: Final = 16 << 10
"""Frames up to this size are copied into one buffer: one TLS record is cheaper than two."""


class TcpStream(asyncio.Protocol):
    """Implements `shoal.net.transport.Stream`; made and authenticated by `TcpTransport`.

    A send that is cancelled has sent the whole frame or nothing.
    """

    def __init__(self, rates: SentRates | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._rates = rates
        self._noted_bytes = 0
        """Acknowledged when our rate was noted last."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._peer: PeerId | None = None
        self._raw = bytearray()
        self._parser: FrameParser | None = None
        self._frames: deque[Frame] = deque()
        self._unread_bytes = 0
        self._is_reading_paused = False
        self._outgoing: deque[Buffer] = deque()
        self._is_writing_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._end: tuple[type[ShoalError], str] | None = None
        self.lost: asyncio.Future[None] = loop.create_future()
        """Done once the connection is gone; never, if there was none."""

    # --- the contract ---------------------------------------------------------

    @property
    def peer(self) -> PeerId:
        """The proven identity of the other side."""
        if self._peer is None:
            raise InternalError("a stream was used before its peer proved its identity")
        return self._peer

    @property
    def remote(self) -> str:
        """The other side's IP address."""
        where = None if self._transport is None else self._transport.get_extra_info("peername")
        return str(where[0]) if where else ""

    async def send(self, header: Buffer, *payload: Buffer) -> None:
        """Send one frame; see Stream.send."""
        buffers = encode_frame(header, payload)
        while self._end is None and (self._is_writing_paused or self._outgoing):
            await self._wait_writable()
        self._check_open()
        self._queue(buffers)
        self._pump()
        while self._end is None and self._outgoing:
            await self._wait_writable()
        self._check_open()

    async def receive(self) -> Frame:
        """The next frame; see Stream.receive."""
        while not self._frames:
            self._check_open()
            await self._wait_readable()
        frame = self._frames.popleft()
        self._unread_bytes -= _cost(frame)
        if self._is_reading_paused and self._unread_bytes < READ_AHEAD_BYTES // 2:
            self._resume_reading()
        return frame

    def close(self) -> None:
        """End the stream; frames whose `send` has returned still travel."""
        self.note_rate()
        self._frames.clear()
        self._outgoing.clear()
        self._finish(PeerUnreachable, "the stream was closed on this side")
        if self._transport is not None and not self._transport.is_closing():
            self._resume_reading()  # TLS reads on, and drops, until the other side is done
            self._transport.close()

    # --- for TcpTransport -----------------------------------------------------

    def note_rate(self) -> None:
        """Have the rate remembered at which the other side takes our bytes."""
        if self._rates is None or self._transport is None or self._transport.is_closing():
            return
        delivery = delivery_of(self._transport.get_extra_info("socket"))
        if delivery is None or delivery.acknowledged_bytes < self._noted_bytes + BURST_BYTES:
            return
        self._noted_bytes = delivery.acknowledged_bytes
        if delivery.is_full and delivery.bytes_per_s:
            self._rates.saw(self.remote, delivery.bytes_per_s)

    @property
    def certificate(self) -> bytes:
        """The other side's TLS certificate (DER); empty if it showed none."""
        session = cast(ssl.SSLObject, self._connected().get_extra_info("ssl_object"))
        return session.getpeercert(binary_form=True) or b""

    def write_raw(self, data: bytes) -> None:
        """Send bytes that are no frame."""
        self._connected().write(data)

    async def read_raw(self, count: int) -> bytes:
        """Exactly `count` bytes from before the frames.

        Raises:
            PeerUnreachable: the stream ended before.
        """
        while len(self._raw) < count:
            self._check_open()
            await self._wait_readable()
        data = bytes(self._raw[:count])
        del self._raw[:count]
        return data

    def start_frames(self, peer: PeerId) -> None:
        """From here on all bytes are frames of `peer`."""
        self._peer = peer
        self._parser = FrameParser()
        raw, self._raw = self._raw, bytearray()
        self._resume_reading()
        if raw:
            self._parse(raw)

    async def wait_lost(self, grace_s: float) -> None:
        """Wait until a closed connection is gone, by force after `grace_s`."""
        if self._transport is None:
            return
        try:
            await asyncio.wait([self.lost], timeout=grace_s)
        finally:
            self.abort()
        await self.lost

    def abort(self) -> None:
        """End the connection without a farewell."""
        self._finish(PeerUnreachable, "the stream was aborted on this side")
        if self._transport is not None and not self.lost.done():
            self._transport.abort()

    # --- asyncio.Protocol -----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is up."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Decrypted bytes have come."""
        if self._end is not None:
            return
        if self._parser is not None:
            self._parse(data)
            return
        self._raw += data
        if len(self._raw) > RAW_BYTES_MAX:
            self._pause_reading()
        _wake(self._reader)

    def eof_received(self) -> None:
        """The other side has closed the stream."""
        self.note_rate()
        self._finish(PeerUnreachable, "the peer closed the stream")

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._finish(PeerUnreachable, f"the connection broke: {error or 'closed'}")
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        """The buffers are full."""
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._is_writing_paused = False
        self._pump()
        _wake(self._writer)

    # --- inside ---------------------------------------------------------------

    def _connected(self) -> asyncio.Transport:
        if self._transport is None:
            raise InternalError("a stream was used before it was connected")
        return self._transport

    def _parse(self, data: Buffer) -> None:
        if self._parser is None:
            raise InternalError("frames were parsed before start_frames")
        try:
            for frame in self._parser.feed(data):
                self._frames.append(frame)
                self._unread_bytes += _cost(frame)
        except ProtocolError as error:
            self._finish(type(error), error.detail)
            self._connected().abort()
        if self._unread_bytes > READ_AHEAD_BYTES:
            self._pause_reading()
        _wake(self._reader)

    def _pause_reading(self) -> None:
        if not self._is_reading_paused and not self._connected().is_closing():
            self._is_reading_paused = True
            self._connected().pause_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused:
            self._is_reading_paused = False
            if not self.lost.done():
                self._connected().resume_reading()

    def _queue(self, buffers: list[Buffer]) -> None:
        sizes = [memoryview(buffer).nbytes for buffer in buffers]
        if sum(sizes) <= JOIN_BYTES_MAX:
            self._outgoing.append(b"".join(buffers))
            return
        for buffer, size in zip(buffers, sizes, strict=True):
            view = memoryview(buffer).cast("B")
            for start in range(0, size, WRITE_SLICE_BYTES):
                self._outgoing.append(view[start : start + WRITE_SLICE_BYTES])

    def _pump(self) -> None:
        while self._outgoing and not self._is_writing_paused and self._end is None:
            self._connected().write(self._outgoing.popleft())

    async def _wait_readable(self) -> None:
        if self._reader is not None:
            raise InternalError("two tasks receive from one stream")
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def _wait_writable(self) -> None:
        if self._writer is not None:
            raise InternalError("two tasks send on one stream")
        self._writer = self._loop.create_future()
        try:
            await self._writer
        finally:
            self._writer = None

    def _finish(self, kind: type[ShoalError], why: str) -> None:
        if self._end is None:
            self._end = (kind, why)
        _wake(self._reader)
        _wake(self._writer)

    def _check_open(self) -> None:
        if self._end is not None:
            kind, why = self._end
            who = "an unproven peer" if self._peer is None else short(self._peer)
            raise kind(f"{who}: {why}")


def _cost(frame: Frame) -> int:
    return len(frame.header) + len(frame.payload) + FRAME_OVERHEAD_BYTES


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
