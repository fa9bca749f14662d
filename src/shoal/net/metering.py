"""Counts what goes over each peer's streams, whatever the transport is."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from shoal.base.ids import PeerId
from shoal.net.address import Address, ListenAddress
from shoal.net.transport import Listener, Stream, StreamHandler, Transport
from shoal.wire.frames import Buffer, Frame

PEERS_MAX: Final = 256
"""Peers that are counted one by one; those that were silent longest are added up."""


@dataclass(slots=True)
class Traffic:
    """Bytes of frames with one peer; what encryption and TCP add is not in them."""

    sent_bytes: int = 0
    received_bytes: int = 0

    def add(self, other: Traffic) -> None:
        """Take over another count."""
        self.sent_bytes += other.sent_bytes
        self.received_bytes += other.received_bytes


class TrafficBook:
    """Traffic by peer, in bounded memory."""

    def __init__(self, peers_max: int = PEERS_MAX) -> None:
        self.others = Traffic()
        """Of peers that are not counted one by one any more."""
        self._peers: OrderedDict[PeerId, Traffic] = OrderedDict()
        self._peers_max = peers_max

    def of(self, peer: PeerId) -> Traffic:
        """The count of a peer, to be added to."""
        found = self._peers.setdefault(peer, Traffic())
        self._peers.move_to_end(peer)
        if len(self._peers) > self._peers_max:
            _, oldest = self._peers.popitem(last=False)
            self.others.add(oldest)
        return found

    def by_peer(self) -> dict[PeerId, Traffic]:
        """Those that are counted one by one."""
        return dict(self._peers)


class MeteredStream:
    """A stream that counts. See `Stream`."""

    def __init__(self, stream: Stream, book: TrafficBook) -> None:
        self._stream = stream
        self._book = book

    @property
    def peer(self) -> PeerId:
        """The proven identity of the other side."""
        return self._stream.peer

    @property
    def remote(self) -> str:
        """The other side's host."""
        return self._stream.remote

    async def send(self, header: Buffer, *payload: Buffer) -> None:
        """Send one frame, and count it."""
        await self._stream.send(header, *payload)
        size = sum(memoryview(part).nbytes for part in (header, *payload))
        self._book.of(self.peer).sent_bytes += size

    async def receive(self) -> Frame:
        """The next frame, counted."""
        frame = await self._stream.receive()
        size = memoryview(frame.header).nbytes + memoryview(frame.payload).nbytes
        self._book.of(self.peer).received_bytes += size
        return frame

    def close(self) -> None:
        """End the stream."""
        self._stream.close()


class MeteredTransport:
    """A transport whose streams count. See `Transport`."""

    def __init__(self, transport: Transport) -> None:
        self.traffic = TrafficBook()
        self._transport = transport

    @property
    def peer(self) -> PeerId:
        """Our own identity."""
        return self._transport.peer

    async def dial(self, address: Address) -> Stream:
        """An authenticated stream."""
        return MeteredStream(await self._transport.dial(address), self.traffic)

    async def listen(self, where: ListenAddress, handler: StreamHandler) -> Listener:
        """Serve streams of strangers."""

        async def serve(stream: Stream) -> None:
            await handler(MeteredStream(stream, self.traffic))

        return await self._transport.listen(where, serve)

    async def close(self) -> None:
        """Close all streams and listeners."""
        await self._transport.close()
