"""Two transports of one kind, ready to talk, and a loop that tolerates no loose ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from shoal.net.address import ListenAddress
from shoal.net.identity import Identity
from shoal.net.memory import MemoryNetwork
from shoal.net.tcp import TcpTransport
from shoal.net.transport import Listener, Stream, Transport

T = TypeVar("T")

Kind = Literal["tcp", "memory"]
KINDS: tuple[Kind, ...] = ("tcp", "memory")

DEADLINE_S = 60.0
"""A test that hangs fails after this."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` on a fresh loop; whatever asyncio reports as lost is a failure."""
    reports: list[dict[str, Any]] = []

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reports.append(context))
        async with asyncio.timeout(DEADLINE_S):
            result = await work
        gc.collect()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == [], "tasks outlive the transports that own them"
        return result

    result = asyncio.run(watched())
    gc.collect()
    assert reports == []
    return result


class Pair:
    """A dialler and a listener, who keeps every stream that comes in."""

    def __init__(self, kind: Kind) -> None:
        self.near_identity = Identity.generate()
        self.far_identity = Identity.generate()
        self.near: Transport
        self.far: Transport
        self.where = ListenAddress(kind, "127.0.0.1", 0)
        if kind == "memory":
            network = MemoryNetwork()
            network.hosts[self.near_identity.peer] = "127.0.0.1"
            self.near = network.transport(self.near_identity.peer)
            self.far = network.transport(self.far_identity.peer)
        else:
            self.near = TcpTransport(self.near_identity)
            self.far = TcpTransport(self.far_identity)
        self.listener: Listener
        self._arrived: asyncio.Queue[Stream] = asyncio.Queue()

    async def keep(self, stream: Stream) -> None:
        """A handler that leaves the stream to the test, until the listener closes."""
        self._arrived.put_nowait(stream)
        await asyncio.Event().wait()

    async def connect(self) -> tuple[Stream, Stream]:
        """Both ends of a new stream: the dialler's and the listener's."""
        stream = await self.near.dial(self.listener.address)
        return stream, await self._arrived.get()


@asynccontextmanager
async def open_pair(kind: Kind) -> AsyncIterator[Pair]:
    """A pair that listens; everything is closed at the end."""
    pair = Pair(kind)
    pair.listener = await pair.far.listen(pair.where, pair.keep)
    try:
        yield pair
    finally:
        await asyncio.gather(pair.near.close(), pair.far.close())
