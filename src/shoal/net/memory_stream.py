"""Streams of the in-memory transport: two ends, and one pipe per direction."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from typing import Final

from shoal.base.errors import PeerUnreachable, ProtocolError
from shoal.base.ids import PeerId, short
from shoal.net.conditions import Conditions, FrameFate, Held
from shoal.wire.frames import Buffer, Frame, FrameParser, encode_frame


class Switchboard:
    """What all pipes of one network share."""

    def __init__(self, conditions: Conditions, buffer_bytes: int) -> None:
        self.conditions = conditions
        self.buffer_bytes = buffer_bytes
        self.blocked: dict[_Pipe, None] = {}
        conditions.subscribe(self._launch_blocked)

    def _launch_blocked(self) -> None:
        for pipe in list(self.blocked):
            pipe.launch()


class MemoryStream:
    """One end of a stream; see Stream. Made in pairs by `connect`."""

    _out: _Pipe
    _in: _Pipe

    def __init__(
        self,
        own: PeerId,
        peer: PeerId,
        open_streams: dict[MemoryStream, None],
        remote: str = "",
    ) -> None:
        """`remote`: where the other side is said to be."""
        self.own = own
        self._remote = remote
        self._peer = peer
        self._open_streams = open_streams
        self.end: str | None = None
        """Why no more can be sent, once that is so."""
        self._is_silent = False
        self._parser = FrameParser()
        self._arrived: deque[_Parcel] = deque()
        self._frames: deque[Frame] = deque()
        self._news = asyncio.Event()
        open_streams[self] = None

    @property
    def peer(self) -> PeerId:
        """The identity of the other side."""
        return self._peer

    @property
    def remote(self) -> str:
        """The other side's host, if it was given one."""
        return self._remote

    async def send(self, header: Buffer, *payload: Buffer) -> None:
        """Send one frame; see Stream.send. If cancelled, the frame was not sent."""
        parts = encode_frame(header, payload)
        await self._out.room()
        if self.end is not None:
            raise PeerUnreachable(f"can't send to {short(self._peer)}: {self.end}")
        self._out.put(_Parcel(b"".join(parts)))

    async def receive(self) -> Frame:
        """The next frame; see Stream.receive."""
        while not self._frames:
            if self._arrived:
                self._unpack(self._arrived.popleft())
            elif self.end is not None:
                raise PeerUnreachable(f"stream of {short(self._peer)} ended: {self.end}")
            else:
                self._news.clear()
                await self._news.wait()
        return self._frames.popleft()

    def close(self) -> None:
        """End the stream in both directions; what was sent before still arrives."""
        self._arrived.clear()
        self._frames.clear()
        if self.finish("closed by ourselves"):
            self._out.put(_END)

    def _unpack(self, parcel: _Parcel) -> None:
        self._in.free(parcel)
        try:
            self._frames.extend(self._parser.feed(parcel.data))
        except ProtocolError:
            self.close()
            raise

    def finish(self, why: str) -> bool:
        """Mark the stream as ended; False if it was already."""
        if self.end is not None:
            return False
        self.end = why
        self._news.set()
        self._out.wake()
        self._open_streams.pop(self, None)
        return True

    def take(self, parcel: _Parcel) -> None:
        """A parcel has arrived."""
        if parcel is _END:
            self.finish("the other side closed it")
        elif self.end is None:
            self._arrived.append(parcel)
            self._news.set()
        elif not self._is_silent:
            self._in.free(parcel)
            self._out.put_end_again()

    def break_off(self, why: str) -> None:
        """End at both ends at once; what has not arrived is lost."""
        for end in (self, self._out.sink):
            end.finish(why)
            end._out.clear()

    def vanish(self, detect_after_s: float | None) -> None:
        """Our peer has crashed."""
        self._arrived.clear()
        self._frames.clear()
        self.finish("our own peer has crashed")
        self._is_silent = detect_after_s is None
        if detect_after_s is None:
            self._out.clear()
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(detect_after_s, self._out.put, _END)

    def answer_again(self) -> None:
        """Our peer is back: it knows nothing of this stream."""
        self._is_silent = False
        self._out.put(_END)


def connect(board: Switchboard, near: MemoryStream, far: MemoryStream) -> None:
    """Join the two ends of a new stream."""
    near._out = far._in = _Pipe(board, near, far)
    far._out = near._in = _Pipe(board, far, near)


class _Parcel:
    """What travels: one encoded frame, or the end of the stream."""

    __slots__ = ("counted_bytes", "data")

    def __init__(self, data: bytes, *, is_copy: bool = False) -> None:
        self.data = data
        self.counted_bytes = 0 if is_copy else len(data)


_END: Final = _Parcel(b"")


class _Pipe:
    """One direction of a stream.

    A parcel is *waiting* (its fate is not known: the path is interrupted), *flying*, or
    with the sink, unread. All three count towards the buffer.
    """

    def __init__(self, board: Switchboard, source: MemoryStream, sink: MemoryStream) -> None:
        self._board = board
        self._source = source
        self.sink = sink
        self._used_bytes = 0
        self._has_room = asyncio.Event()
        self._waiting: deque[_Parcel] = deque()
        self._flying: list[tuple[float, int, _Parcel]] = []
        self._numbers = itertools.count()
        self._last_arrival_s = 0.0
        self._due_s: float | None = None
        self._timer: asyncio.Handle | None = None
        self._break_timer: asyncio.TimerHandle | None = None

    async def room(self) -> None:
        """Wait until there is room for more, or the stream has ended."""
        while self._used_bytes >= self._board.buffer_bytes and self._source.end is None:
            self._has_room.clear()
            await self._has_room.wait()

    def wake(self) -> None:
        """Let a waiting sender look again."""
        self._has_room.set()

    def free(self, parcel: _Parcel) -> None:
        """The parcel no longer takes room."""
        self._used_bytes -= parcel.counted_bytes
        self.wake()

    def put(self, parcel: _Parcel) -> None:
        """Send the parcel on its way."""
        self._used_bytes += parcel.counted_bytes
        self._waiting.append(parcel)
        self.launch()

    def put_end_again(self) -> None:
        """Answer a parcel that came after our end (as TCP answers with a reset)."""
        is_under_way = any(parcel is _END for _, _, parcel in self._flying)
        if not is_under_way and _END not in self._waiting:
            self.put(_END)

    def clear(self) -> None:
        """Lose everything that has not arrived."""
        self._waiting.clear()
        self._flying.clear()
        self._unblock()

    def launch(self) -> None:
        """Let the waiting parcels go as far as the conditions allow."""
        ask = self._board.conditions.frame
        while self._waiting:
            parcel = self._waiting[0]
            fate = ask(self._source.own, self._source.peer, len(parcel.data))
            if isinstance(fate, Held):
                self._block(fate)
                return
            self._waiting.popleft()
            if fate.is_reset and parcel is not _END:
                self._source.break_off("connection reset")
                return
            self._fly(parcel, fate)
        self._unblock()

    def _block(self, fate: Held) -> None:
        self._board.blocked[self] = None
        if self._break_timer is None and fate.break_after_s < math.inf:
            loop = asyncio.get_running_loop()
            self._break_timer = loop.call_later(
                fate.break_after_s, self._give_up, fate.break_after_s
            )

    def _unblock(self) -> None:
        self._board.blocked.pop(self, None)
        if self._break_timer is not None:
            self._break_timer.cancel()
            self._break_timer = None

    def _give_up(self, after_s: float) -> None:
        """Both ends notice: the source gets no acknowledgements, the sink no keep-alives."""
        self._source.break_off(f"nothing got through for {after_s:g} s")

    def _fly(self, parcel: _Parcel, fate: FrameFate) -> None:
        now_s = asyncio.get_running_loop().time()
        delays_s = fate.arrivals_s
        if parcel is _END:
            delays_s = delays_s[:1] or (0.0,)
        elif not delays_s:
            self.free(parcel)
            return
        elif fate.corrupt_byte is not None:
            parcel = _Parcel(_corrupted(parcel.data, fate.corrupt_byte))
        arrival_s = self._last_arrival_s = max(self._last_arrival_s, now_s + delays_s[0])
        heapq.heappush(self._flying, (arrival_s, next(self._numbers), parcel))
        for delay_s in delays_s[1:]:
            copy = _Parcel(parcel.data, is_copy=True)
            copy_arrival_s = arrival_s + max(0.0, delay_s - delays_s[0])
            heapq.heappush(self._flying, (copy_arrival_s, next(self._numbers), copy))
        self._schedule(now_s)

    def _schedule(self, now_s: float) -> None:
        if not self._flying:
            return
        next_s = self._flying[0][0]
        if self._timer is not None:
            if self._due_s is not None and self._due_s <= next_s:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._due_s = next_s
        if next_s <= now_s:
            self._timer = loop.call_soon(self._arrive)
        else:
            self._timer = loop.call_at(next_s, self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        # A loop may call its timers early by its clock's resolution.
        until_s = now_s if self._due_s is None else max(now_s, self._due_s)
        while self._flying and self._flying[0][0] <= until_s:
            _, _, parcel = heapq.heappop(self._flying)
            self.sink.take(parcel)
        self._schedule(now_s)


def _corrupted(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index % len(changed)] ^= 0xFF
    return bytes(changed)
