"""The Transport contract: authenticated streams of frames.

Implementations: `tcp.TcpTransport`, `memory.MemoryTransport`. Both pass
tests/contracts/test_transport.py. A stream is full duplex, ordered, and lives until
either side closes it; how streams map to connections is the transport's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from shoal.base.ids import PeerId
from shoal.net.address import Address, ListenAddress
from shoal.wire.frames import Buffer, Frame


class Stream(Protocol):
    """One authenticated, ordered, full-duplex stream of frames."""

    @property
    def peer(self) -> PeerId:
        """The proven identity of the other side."""

    @property
    def remote(self) -> str:
        """The host that the network names for the other side; empty where there is none.

        Said by the network, not by the peer; one behind a router has the router's address.
        """

    async def send(self, header: Buffer, *payload: Buffer) -> None:
        """Send one frame; waits while the transport's buffers are full.

        Payload buffers must not be changed afterwards. One sender at a time.

        Raises:
            PeerUnreachable: the stream is closed or broken.
            MessageTooLarge: over the frame limits; the stream stays usable.
        """

    async def receive(self) -> Frame:
        """The next frame. One receiver at a time; safe to cancel.

        Raises:
            PeerUnreachable: the stream ended.
            ProtocolError: the peer sent bytes that are no frame; the stream is closed.
        """

    def close(self) -> None:
        """End the stream at once, in both directions. Idempotent, never waits."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one incoming stream; the stream is closed when it returns or raises."""


class Listener(Protocol):
    """An open ear."""

    @property
    def address(self) -> Address:
        """Where others can dial us; the port is the real one."""

    async def close(self) -> None:
        """Stop listening and close every stream that came in here."""


class Transport(Protocol):
    """Dials and listens with one identity."""

    @property
    def peer(self) -> PeerId:
        """Our own identity."""

    async def dial(self, address: Address) -> Stream:
        """An authenticated stream to `address.peer`, within DIAL_TIMEOUT_S.

        Raises:
            PeerUnreachable: nobody answers there.
            PeerTimeout: no full handshake in time.
            PeerMisbehaved: somebody answers who can't prove to be `address.peer`.
        """

    async def listen(self, where: ListenAddress, handler: StreamHandler) -> Listener:
        """Serve streams of strangers: one task per stream, errors logged, never fatal.

        Raises:
            ConfigError: the address can't be bound.
        """

    async def close(self) -> None:
        """Close all streams and listeners."""
