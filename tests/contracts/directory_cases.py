"""Directories to test: a shared static one, and gossiping ones over the memory network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from shoal.discovery.directory import Directory, Snapshot
from shoal.discovery.exchange import answer_directory
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.discovery.static import StaticDirectory
from shoal.discovery.store import RecordStore
from shoal.net.address import Address, ListenAddress, parse_address
from shoal.net.channel import PURPOSE_GOSSIP, Channel, accept_channel
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Stream
from shoal.wire.directory import GetRecords, Publish
from tests.unit.discovery_cases import SWARM, identity, signed

Kind = Literal["static", "gossip"]
KINDS: tuple[Kind, ...] = ("static", "gossip")

PASS = SwarmPass.open(SWARM)

Answer = Callable[[Channel], Awaitable[None]]


@dataclass
class Member:
    """One peer and its way to look at the swarm."""

    identity: Identity
    directory: Directory
    address: str = ""

    def record(self, counter: int, **fields: Any) -> bytes:
        addresses = {"addresses": [self.address]} if self.address else {}
        return signed(self.identity, counter, **addresses | fields)


async def answer_from(store: RecordStore, channel: Channel) -> None:
    """What a server's control handler does with questions about records."""
    clock = asyncio.get_running_loop().time
    while True:
        message, _ = await channel.receive()
        assert isinstance(message, GetRecords | Publish)
        await channel.send(answer_directory(store, message, clock()))


async def listen(network: MemoryNetwork, who: Identity, answer: Answer, port: int = 0) -> Address:
    async def serve(stream: Stream) -> None:
        channel, _ = await accept_channel(stream, PASS)
        await answer(channel)

    transport = network.transport(who.peer)
    listener = await transport.listen(ListenAddress("memory", "host", port), serve)
    return listener.address


def directory_of(
    network: MemoryNetwork, who: Identity, *joins: Address, is_reader: bool = False
) -> GossipDirectory:
    """A gossip directory that nobody can dial yet."""
    config = GossipConfig(swarm_pass=PASS, joins=joins, is_reader=is_reader)
    return GossipDirectory(network.transport(who.peer), config, random.Random(who.peer))


@asynccontextmanager
async def open_gossip(
    network: MemoryNetwork, number: int, *joins: Address
) -> AsyncIterator[Member]:
    """A gossip directory that also answers, on a peer of its own."""
    who = identity(number)
    directory = directory_of(network, who, *joins)
    address = await listen_for(network, directory, who)
    try:
        async with directory:
            yield Member(who, directory, str(address))
    finally:
        await network.transport(who.peer).close()


async def listen_for(network: MemoryNetwork, directory: GossipDirectory, who: Identity) -> Address:
    """Answer for a directory as a server does, on a place that only depends on `who`."""

    async def serve(stream: Stream) -> None:
        channel, purpose = await accept_channel(stream, PASS)
        if purpose == PURPOSE_GOSSIP:
            await directory.serve(channel)
        else:
            await answer_from(directory.store, channel)

    where = ListenAddress("memory", who.peer.hex()[:12], 1)
    return (await network.transport(who.peer).listen(where, serve)).address


@asynccontextmanager
async def open_members(kind: Kind, count: int) -> AsyncIterator[list[Member]]:
    """Members of one swarm; those of a gossiping one all join the first."""
    async with AsyncExitStack() as stack:
        if kind == "static":
            shared = StaticDirectory(SWARM)
            yield [Member(identity(number), shared) for number in range(1, count + 1)]
            return
        network = MemoryNetwork()
        members = [await stack.enter_async_context(open_gossip(network, 1))]
        first = parse_address(members[0].address)
        for number in range(2, count + 1):
            members.append(await stack.enter_async_context(open_gossip(network, number, first)))
        yield members


async def until(directory: Directory, holds: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot for which `holds`."""
    snapshot = directory.snapshot()
    while not holds(snapshot):
        snapshot = await directory.changed(snapshot.version)
    return snapshot


def counters(snapshot: Snapshot) -> dict[bytes, int]:
    return {bytes(one.record.peer): one.record.counter for one in snapshot.records}
