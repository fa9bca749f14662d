"""Drives the sending ends of all sessions on one stream to one peer.

One writer task sends, one reader task takes answers; neither waits for the other, so
two peers that feed each other can't block in a circle. All entries that are ready go
into one frame, round-robin over sessions.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from shoal.base.errors import PeerTimeout, PeerUnreachable, ProtocolError, error_from_code
from shoal.base.ids import PeerId, SessionId, short
from shoal.base.limits import (
    ENTRIES_PER_FRAME_MAX,
    HEADER_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
)
from shoal.link.hearing import QUESTION, SILENT_S, Hearing, Judgement
from shoal.link.outbound import Outbound, Sendable
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.wire.messages import Ack, Error, Gap, Have, Open, Rows, Stale

LinkKey = tuple[SessionId, int]
"""(session, border)."""

FRAME_BYTES_TARGET = 1 << 20
"""A frame is closed at this size: keeps the round-robin between sessions fair."""


class SenderEvents(Protocol):
    """What the owner of the outbounds wants to hear."""

    def on_cursor_moved(self, outbound: Outbound) -> None:
        """Rows were sent or acknowledged: the session may be scheduled again."""

    def on_needs_earlier(self, outbound: Outbound) -> None:
        """The receiver needs rows that were trimmed from the log."""


class RowSender:
    """The sending side of the data link to one peer; survives its streams."""

    def __init__(self, peer: PeerId, events: SenderEvents) -> None:
        self.peer = peer
        self.is_connected = False
        self._events = events
        self._outbounds: dict[LinkKey, Outbound] = {}
        self._opens: dict[LinkKey, None] = {}
        self._ready: dict[LinkKey, None] = {}
        self._wake = asyncio.Event()
        self._channel: Channel | None = None
        self._hearing = Hearing()
        self._is_asking = False
        """Whether the writer is to ask the peer for a word."""
        self._turn = asyncio.Lock()

    @property
    def outbounds(self) -> list[Outbound]:
        """The links that go to this peer now."""
        return list(self._outbounds.values())

    def attach(self, outbound: Outbound) -> None:
        """Send this session's rows here; the receiver is asked what it has first."""
        key = (outbound.session, outbound.border)
        self._outbounds[key] = outbound
        self._ready.pop(key, None)
        self._opens[key] = None
        self._wake.set()

    def detach(self, outbound: Outbound) -> None:
        """No longer send this session's rows here."""
        key = (outbound.session, outbound.border)
        if self._outbounds.get(key) is outbound:
            for table in (self._outbounds, self._opens, self._ready):
                table.pop(key, None)

    def wake(self, outbound: Outbound) -> None:
        """The log grew or was cut."""
        key = (outbound.session, outbound.border)
        if outbound.has_entry and self._outbounds.get(key) is outbound:
            self._ready[key] = None
            self._wake.set()

    def close(self) -> None:
        """End the stream that is served now, if there is one."""
        if self._channel is not None:
            self._channel.close()

    async def run(
        self, channel: Channel, *, idle_s: float = math.inf, silent_s: float = SILENT_S
    ) -> None:
        """Serve one stream until it breaks, or carried no session for `idle_s`.

        A peer that owes a word is waited for `silent_s` (see `hearing.py`).

        Raises:
            PeerError, ProtocolError: why it ended.
        """
        if self._channel is not None:
            self._channel.close()  # the peer dialled anew: the latest stream counts
        self._channel = channel
        async with self._turn:
            for outbound in self._outbounds.values():
                self._opens[(outbound.session, outbound.border)] = None
            self._ready.clear()
            self._wake.set()
            self._hearing, self._is_asking = Hearing(silent_s), False
            self.is_connected = True
            try:
                await first_failure(self._write(channel), self._read(channel), self._watch(idle_s))
            finally:
                self.is_connected = False
                for outbound in self._outbounds.values():
                    outbound.is_open = False
                channel.close()

    async def _write(self, channel: Channel) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._opens or self._ready or self._is_asking:
                if self._is_asking:
                    self._is_asking = False
                    await channel.send(QUESTION)
                while self._opens:
                    key = next(iter(self._opens))
                    del self._opens[key]
                    self._hearing.sent(0, now())
                    await channel.send(Open(*key, self._outbounds[key].epoch))
                batch = self._collect()
                if batch:
                    self._hearing.sent(sum(item.entry.payload_bytes for item in batch), now())
                    rows = Rows([item.header for item in batch])
                    await channel.send(
                        rows, *(item.entry.data() for item in batch if item.entry.payload_bytes)
                    )

    def _collect(self) -> list[Sendable]:
        batch: list[Sendable] = []
        size = header_size = 0
        while self._ready and size < FRAME_BYTES_TARGET and len(batch) < ENTRIES_PER_FRAME_MAX:
            key = next(iter(self._ready))
            outbound = self._outbounds[key]
            next_size, next_header_size = outbound.next_size()
            header_size += next_header_size
            if batch and (size + next_size > PAYLOAD_BYTES_MAX or header_size > HEADER_BYTES_MAX):
                break
            del self._ready[key]
            item = outbound.next_entry()
            if item is None:
                continue
            batch.append(item)
            size += item.entry.payload_bytes
            if outbound.has_entry:
                self._ready[key] = None
            self._events.on_cursor_moved(outbound)
        return batch

    async def _read(self, channel: Channel) -> None:
        now = asyncio.get_running_loop().time
        while True:
            message, _ = await channel.receive()
            match message:
                case Have() | Gap() | Ack() | Stale():
                    if not isinstance(message, Have):  # which also comes unasked
                        is_answer = message.session == QUESTION.session
                        self._hearing.heard(now(), is_answer=is_answer)
                    self._on_answer(message)
                case Error():
                    raise error_from_code(message.code, message.detail, message.retry_after_s)
                case _:
                    raise ProtocolError(f"{type(message).__name__} is no answer on a data link")

    async def _watch(self, idle_s: float) -> None:
        """Give up a path that swallows what it carries, and a stream that nobody uses."""
        used_s = asyncio.get_running_loop().time()
        while True:
            now_s = asyncio.get_running_loop().time()
            if self._outbounds:
                used_s = now_s
            elif now_s - used_s > idle_s:
                raise PeerUnreachable("no session uses this link")
            match self._judge(now_s):
                case Judgement.ASK:
                    self._is_asking = True
                    self._wake.set()
                case Judgement.GIVE_UP:
                    raise PeerTimeout(f"peer {short(self.peer)} is silent on its data link")
                case Judgement.WAIT:
                    pass
            await asyncio.sleep(self._hearing.wait_s(now_s))

    def _judge(self, now_s: float) -> Judgement:
        links = self._outbounds.values()
        is_owed = any(not one.is_open or one.acked < one.cursor or one.has_entry for one in links)
        unacked_bytes = sum(one.in_flight_bytes for one in links)
        return self._hearing.look(now_s, is_owed=is_owed, unacked_bytes=unacked_bytes)

    def _on_answer(self, message: Have | Gap | Ack | Stale) -> None:
        outbound = self._outbounds.get((SessionId(message.session), message.border))
        if outbound is None:
            return
        match message:
            case Have():
                outbound.on_have(
                    message.epoch,
                    message.rev,
                    message.length,
                    message.window_bytes,
                    message.worked_off,
                )
            case Gap():
                outbound.on_gap(message.epoch, message.rev, message.length)
            case Ack():
                outbound.on_ack(message.epoch, message.rev, message.length)
            case Stale():
                outbound.on_stale(message.epoch)
        if outbound.needs_earlier:
            self._events.on_needs_earlier(outbound)
        else:
            self._events.on_cursor_moved(outbound)
        self.wake(outbound)
