"""The in-memory transport: frames between peers of one process, on one event loop.

Passes the same contract suite as TCP. Frames travel as encoded bytes, buffers are
bounded, and what happens between two peers is decided by handed-in `Conditions`:
nothing at all by default, whatever a simulation wants in the lab. Identities are
taken as given here, not proved.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Final

from shoal.base.errors import ConfigError, PeerMisbehaved, PeerTimeout, PeerUnreachable
from shoal.base.ids import PeerId, short
from shoal.base.limits import DIAL_TIMEOUT_S
from shoal.net.address import Address, ListenAddress
from shoal.net.conditions import Conditions, PerfectConditions
from shoal.net.memory_stream import MemoryStream, Switchboard, connect
from shoal.net.transport import StreamHandler

_log = logging.getLogger(__name__)

SCHEME: Final = "memory"

BUFFER_BYTES: Final = 1 << 20
"""Bytes under way and unread in one direction of a stream before `send` waits: what
sockets of an ordinary machine hold together."""

_FIRST_FREE_PORT: Final = 49_152
"""Ports that nobody asked for start here, as in the IANA's dynamic range."""

_Place = tuple[str, int]
"""Host name and port."""


class MemoryNetwork:
    """A network inside this process. Use it on one event loop only."""

    def __init__(
        self, conditions: Conditions | None = None, *, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._board = Switchboard(conditions or PerfectConditions(), buffer_bytes)
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._listeners: dict[_Place, MemoryListener] = {}
        self._silent_places: dict[_Place, PeerId] = {}
        self._half_open: dict[PeerId, list[MemoryStream]] = {}
        self.hosts: dict[PeerId, str] = {}
        """Addresses that peers seem to dial from; who is not among them has none."""
        self._ports = itertools.count(_FIRST_FREE_PORT)

    def transport(self, peer: PeerId) -> MemoryTransport:
        """The peer's transport: a new one if it has none, closed it, or crashed."""
        transport = self._transports.get(peer)
        if transport is None:
            for stream in self._half_open.pop(peer, []):
                stream.answer_again()
            for place in [p for p, dead in self._silent_places.items() if dead == peer]:
                del self._silent_places[place]
            transport = self._transports[peer] = MemoryTransport(self, peer)
        return transport

    def crash(self, peer: PeerId, *, detect_after_s: float | None = 0.0) -> None:
        """End the peer's transport without a farewell. No-op if it has none.

        Its own calls fail and its stream handlers are cancelled at once. The others'
        streams to it break after `detect_after_s`; if that is None (a machine without
        power) what they send vanishes until the peer is back. `transport(peer)` starts
        it anew.
        """
        transport = self._transports.pop(peer, None)
        if transport is None:
            return
        for place in [p for p, owner in self._listeners.items() if owner.address.peer == peer]:
            del self._listeners[place]
            if detect_after_s is None:
                self._silent_places[place] = peer
        streams = transport._crash()
        for stream in streams:
            stream.vanish(detect_after_s)
        if detect_after_s is None:
            self._half_open.setdefault(peer, []).extend(streams)


class MemoryTransport:
    """One peer's end of a MemoryNetwork; made by `MemoryNetwork.transport`."""

    def __init__(self, network: MemoryNetwork, peer: PeerId) -> None:
        self._network = network
        self._peer = peer
        self._streams: dict[MemoryStream, None] = {}
        self._heard: list[MemoryListener] = []
        self._is_closed = False

    @property
    def peer(self) -> PeerId:
        """Our own identity."""
        return self._peer

    @property
    def num_streams(self) -> int:
        """Streams that are open now, dialled or accepted."""
        return len(self._streams)

    async def dial(self, address: Address) -> MemoryStream:
        """A stream to `address.peer`; see Transport.dial."""
        if address.scheme != SCHEME:
            raise PeerUnreachable(f"{address} is not in memory: dial it with its own transport")
        place = (address.host, address.port)
        fate = self._network._board.conditions.dial(self._peer, address.peer)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await asyncio.sleep(fate.delay_s)
                if fate.kind == "black_hole" or place in self._network._silent_places:
                    await asyncio.Event().wait()
        except TimeoutError as error:
            raise PeerTimeout(f"no answer from {address} in {DIAL_TIMEOUT_S:g} s") from error
        listener = self._network._listeners.get(place)
        if listener is None or fate.kind == "refused":
            raise PeerUnreachable(f"{address} refuses connections")
        if listener.address.peer != address.peer:
            raise PeerMisbehaved(f"{address} is answered by {short(listener.address.peer)}")
        if self._is_closed:
            raise PeerUnreachable("our own transport is closed")
        return self._connect(listener)

    def _connect(self, listener: MemoryListener) -> MemoryStream:
        near = MemoryStream(self._peer, listener.address.peer, self._streams)
        far = MemoryStream(
            listener.address.peer,
            self._peer,
            listener._transport._streams,
            self._network.hosts.get(self._peer, ""),
        )
        connect(self._network._board, near, far)
        listener._accept(far)
        return near

    async def listen(self, where: ListenAddress, handler: StreamHandler) -> MemoryListener:
        """Serve incoming streams with `handler`; see Transport.listen."""
        if self._is_closed:
            raise ConfigError("this transport is closed: ask the network for a new one")
        if where.scheme != SCHEME:
            raise ConfigError(f"can't listen on {where} in memory (write memory://NAME:PORT)")
        port = where.port or next(self._network._ports)
        place = (where.host, port)
        if place in self._network._listeners:
            raise ConfigError(f"{where} is taken: choose another port, or 0 for any free one")
        address = Address(SCHEME, self._peer, where.host, port)
        listener = self._network._listeners[place] = MemoryListener(self, address, handler)
        self._heard.append(listener)
        return listener

    async def close(self) -> None:
        """Close all streams and listeners, and wait for the handlers to end."""
        self._is_closed = True
        if self._network._transports.get(self._peer) is self:
            del self._network._transports[self._peer]
        for stream in list(self._streams):
            stream.close()
        for listener in self._heard:
            await listener.close()

    def _crash(self) -> list[MemoryStream]:
        self._is_closed = True
        for listener in self._heard:
            listener._cancel()
        return list(self._streams)


class MemoryListener:
    """An open ear in a MemoryNetwork."""

    def __init__(
        self, transport: MemoryTransport, address: Address, handler: StreamHandler
    ) -> None:
        self._transport = transport
        self._address = address
        self._handler = handler
        self._serving: dict[asyncio.Task[None], MemoryStream] = {}

    @property
    def address(self) -> Address:
        """Where others can dial us."""
        return self._address

    async def close(self) -> None:
        """Stop listening, close every stream that came in here, end their handlers."""
        listeners = self._transport._network._listeners
        place = (self._address.host, self._address.port)
        if listeners.get(place) is self:
            del listeners[place]
        for stream in self._serving.values():
            stream.close()
        own = asyncio.current_task()
        others = [task for task in self._serving if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _accept(self, stream: MemoryStream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._serving[task] = stream
        task.add_done_callback(self._serving.pop)

    def _cancel(self) -> None:
        for task in self._serving:
            task.cancel()

    async def _serve(self, stream: MemoryStream) -> None:
        try:
            await self._handler(stream)
        except PeerUnreachable as error:
            _log.debug("stream of %s ended: %s", short(stream.peer), error)
        except Exception:  # noqa: BLE001 - a task's top: a stranger's stream is never fatal
            _log.exception("handler failed on a stream of %s", short(stream.peer))
        finally:
            stream.close()
