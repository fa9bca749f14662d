"""The gossip directory itself, over streams of a simulated network: delays, splits, a crash."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

from shoal.base.ids import PeerId
from shoal.discovery.gossip import GossipDirectory
from shoal.discovery.gossiper import SILENCE_S
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.net.address import Address
from shoal.net.memory import MemoryNetwork
from shoal.server.announcing import REFUTE_GAP_S, REPUBLISH_AFTER_S
from tests.contracts.directory_cases import counters, directory_of, listen_for, until
from tests.unit.discovery_cases import identity, signed

SERVERS = 12


class Server:
    """A directory that publishes as `server.announcing` does."""

    address: Address

    def __init__(self, network: MemoryNetwork, number: int, *joins: Server) -> None:
        self.who = identity(number)
        self._network = network
        self._joins = [other.address for other in joins]
        self._counter = 0

    async def open(self, stack: AsyncExitStack) -> None:
        self.directory = directory_of(self._network, self.who, *self._joins)
        stack.push_async_callback(self._network.transport(self.who.peer).close)
        self.address = await listen_for(self._network, self.directory, self.who)
        await stack.enter_async_context(self.directory)
        await self.publish()
        keeping = asyncio.create_task(self._keep())
        stack.callback(keeping.cancel)

    async def publish(self) -> None:
        self._counter += 1
        data = signed(self.who, self._counter, addresses=[str(self.address)])
        await self.directory.publish(data)

    async def _keep(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPUBLISH_AFTER_S):
                    await self.directory.suspected()
            except TimeoutError:
                pass
            await self.publish()
            await asyncio.sleep(REFUTE_GAP_S)


def seen(directory: GossipDirectory) -> set[bytes]:
    return set(counters(directory.snapshot()))


async def all_see(servers: list[Server], timeout_s: float) -> None:
    everybody = {bytes(server.who.peer) for server in servers}
    async with asyncio.timeout(timeout_s):
        for server in servers:
            await until(server.directory, lambda found: set(counters(found)) == everybody)


def test_servers_in_a_line_through_a_split_and_a_dead_machine() -> None:
    async def work() -> None:
        conditions = SimulatedNetwork(
            random.Random(1), default=LinkConditions(delay_s=0.03, jitter_s=0.02, loss=0.01)
        )
        network = MemoryNetwork(conditions)
        async with AsyncExitStack() as stack:
            servers: list[Server] = []
            for number in range(1, SERVERS + 1):
                servers.append(Server(network, number, *servers[-1:]))
                await servers[-1].open(stack)
            await all_see(servers, 10.0)

            few, most = servers[:4], servers[4:]
            conditions.partition([s.who.peer for s in few], [s.who.peer for s in most])
            await asyncio.sleep(90.0)
            for server in most:
                assert seen(server.directory) >= {bytes(other.who.peer) for other in most}
            conditions.heal()
            await all_see(servers, 60.0)

            dead = servers.pop()
            network.crash(PeerId(dead.who.peer), detect_after_s=None)
            await all_see(servers, SILENCE_S + 11.0)

    run_virtual(work(), timeout_s=1000.0)


def test_a_stopped_process_that_goes_on_is_taken_back() -> None:
    """A laptop that sleeps: the others drop it, and it refutes when it wakes."""

    async def work() -> None:
        conditions = SimulatedNetwork(random.Random(2), default=LinkConditions(delay_s=0.01))
        network = MemoryNetwork(conditions)
        async with AsyncExitStack() as stack:
            servers = [Server(network, 1)]
            await servers[0].open(stack)
            for number in range(2, 6):
                servers.append(Server(network, number, servers[0]))
                await servers[-1].open(stack)
            await all_see(servers, 10.0)
            sleeper = servers[2]
            conditions.freeze(sleeper.who.peer)
            await all_see([server for server in servers if server is not sleeper], 20.0)
            conditions.thaw(sleeper.who.peer)
            await all_see(servers, 60.0)

    run_virtual(work(), timeout_s=1000.0)
