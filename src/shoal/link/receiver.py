"""Drives the receiving ends of all sessions on one stream from one peer.

Reading never waits for writing: answers are collected per session, the latest of a kind
wins, and a second task sends them.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from msgspec import structs

from shoal.base.errors import ProtocolError, error_from_code
from shoal.base.ids import PeerId
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.wire.frames import Buffer
from shoal.wire.messages import Ack, Entry, Error, Gap, Have, Open, Rows, Stale, split_rows

Answer = Have | Gap | Ack | Stale

ACK_DELAY_S = 0.02
"""Acknowledgements wait so long for later ones: nobody but the log of the sender needs them, and
where rows arrive there is something to compute first. A quarter of a window at 50 MB/s."""

PENDING_ANSWERS_MAX = 8192
"""Answers waiting to be sent; beyond this the oldest is dropped. A peer that doesn't read
its answers while it opens thousands of sessions harms only itself."""


class ReceiverEvents(Protocol):
    """Who takes the rows."""

    def on_open(self, peer: PeerId, message: Open) -> Answer | None:
        """A sender asks what is held."""

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Answer | None:
        """Rows arrived; may not wait.

        Raises:
            ShoalError: the peer misbehaves; the stream is closed.
        """


class RowReceiver:
    """The receiving side of one data stream from one peer."""

    def __init__(self, channel: Channel, events: ReceiverEvents) -> None:
        self.peer = channel.peer
        self._channel = channel
        self._events = events
        self._answers: dict[tuple[bytes, int, type], Answer] = {}
        self._wake = asyncio.Event()
        self._acking: asyncio.TimerHandle | None = None
        self.heard_s = asyncio.get_running_loop().time()
        """Loop time of the last message."""

    def post(self, answer: Answer) -> None:
        """Send this answer soon; it replaces an older one of its kind."""
        kind = Have if isinstance(answer, Gap) else type(answer)
        key = (answer.session, answer.border, kind)
        pending = self._answers.pop(key, None)
        if isinstance(answer, Gap) and isinstance(pending, Have) and pending.epoch == answer.epoch:
            answer = structs.replace(pending, rev=answer.rev, length=answer.length)
        self._answers[key] = answer
        if len(self._answers) > PENDING_ANSWERS_MAX:
            del self._answers[next(iter(self._answers))]
        if not isinstance(answer, Ack):
            self._wake.set()
        elif self._acking is None:
            self._acking = asyncio.get_running_loop().call_later(ACK_DELAY_S, self._wake.set)

    def close(self) -> None:
        """End the stream."""
        self._channel.close()

    async def run(self) -> None:
        """Serve the stream until it breaks.

        Raises:
            PeerError, ProtocolError: why it ended.
        """
        try:
            await first_failure(self._read(), self._write())
        except ProtocolError as error:
            await self._channel.refuse(error)
            raise
        finally:
            if self._acking is not None:
                self._acking.cancel()
            self._channel.close()

    async def _read(self) -> None:
        while True:
            message, payload = await self._channel.receive()
            self.heard_s = asyncio.get_running_loop().time()
            match message:
                case Rows():
                    for entry, part in split_rows(message, payload):
                        answer = self._events.on_entry(self.peer, entry, part)
                        if answer is not None:
                            self.post(answer)
                case Open():
                    answer = self._events.on_open(self.peer, message)
                    if answer is not None:
                        self.post(answer)
                case Error():
                    raise error_from_code(message.code, message.detail, message.retry_after_s)
                case _:
                    raise ProtocolError(f"{type(message).__name__} has no place on a data link")

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._acking is not None:
                self._acking.cancel()
                self._acking = None
            while self._answers:
                key = next(iter(self._answers))
                await self._channel.send(self._answers.pop(key))
