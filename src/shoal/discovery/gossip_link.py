"""One gossip stream: what is to be said waits in a bounded outbox, what is heard is passed on."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from shoal.base.ids import PeerId, short
from shoal.base.limits import HEADER_BYTES_MAX
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.wire.directory import Records
from shoal.wire.gossip import Part
from shoal.wire.messages import Message

logger = logging.getLogger(__name__)

OUTBOX_MAX: Final = 1024
"""Messages waiting for a neighbour that does not read; beyond this the stream is closed."""

OUTBOX_BYTES_MAX: Final = 32 * HEADER_BYTES_MAX
"""Bytes of records among them: two directories of the largest swarm, 8 MiB."""


class GossipLink:
    """A stream to one neighbour."""

    def __init__(self, channel: Channel) -> None:
        self.peer: PeerId = channel.peer
        self._channel = channel
        self._outbox: deque[Message] = deque()
        self._outbox_bytes = 0
        self._has_mail = asyncio.Event()

    def post(self, message: Message) -> None:
        """Send soon; never waits. A neighbour that does not read loses the stream."""
        self._outbox_bytes += _record_bytes(message)
        if len(self._outbox) >= OUTBOX_MAX or self._outbox_bytes > OUTBOX_BYTES_MAX:
            logger.warning("neighbour does not read its gossip stream peer=%s", short(self.peer))
            self._channel.close()
            return
        self._outbox.append(message)
        self._has_mail.set()

    def part(self) -> None:
        """Say goodbye, then close; what else waited is dropped."""
        self._outbox.clear()
        self._outbox_bytes = 0
        self.post(Part())

    def close(self) -> None:
        """End the stream at once."""
        self._channel.close()

    async def run(self, hear: Callable[[Message], None]) -> None:
        """Pass on what comes and send what is posted, until the stream ends.

        Raises:
            PeerError, ProtocolError: why it ended; what `hear` raises ends it too.
        """
        await first_failure(self._read(hear), self._write())

    async def _read(self, hear: Callable[[Message], None]) -> None:
        while True:
            message, _ = await self._channel.receive()
            hear(message)

    async def _write(self) -> None:
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while self._outbox:
                message = self._outbox.popleft()
                self._outbox_bytes -= _record_bytes(message)
                await self._channel.send(message)
                if isinstance(message, Part):
                    self._channel.close()


def _record_bytes(message: Message) -> int:
    return sum(map(len, message.records)) if isinstance(message, Records) else 0
