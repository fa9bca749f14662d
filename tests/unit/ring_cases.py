"""A starter and nodes that follow it, over streams in memory."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

from shoal.base.errors import PeerUnreachable
from shoal.base.spans import Span
from shoal.client.ring import ask_ring
from shoal.lab.clock import run_virtual
from shoal.net.address import ListenAddress
from shoal.net.channel import PURPOSE_RING, accept_channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.plan.ring import RingModel as Sizes
from shoal.server.ring_desk import RingDesk
from shoal.server.ring_keeper import RingKeeper, RingWish
from shoal.server.ring_node import NodeFigures, RingMember
from shoal.wire.ring import Measured, RingModel
from tests.unit.discovery_cases import identity

PASS = SwarmPass.open("tests")
MIB = 1 << 20
SIZES = Sizes(
    weight_bytes=(10 * MIB,) * 12, token_bytes=(1,) * 12, head_bytes=MIB, row_bytes=1,
    cache_tokens=16,
)  # fmt: skip
MODEL = RingModel(bytes(16), "float32", "none", "auto", 16)


class Work:
    """A node that does what it is told, after a while."""

    def __init__(self, block_s=0.01, memory=200 * MIB, *, take_s=1.0, fault=None, bad=None):
        self.span = Span(0, 0)
        self.told, self.measured, self.seen_off = [], 0, []
        self.pace_s = 0.0
        self.free_bytes = 0
        self._block_s, self._memory, self._take_s = block_s, memory, take_s
        self._fault, self._bad = fault, bad

    async def measure(self, model):
        self.measured += 1
        await asyncio.sleep(0.5)
        if self._bad is not None:
            raise self._bad
        return Measured(self._memory, [(1, self._block_s)], 0.001)

    async def take(self, span, *, is_beside):
        self.told.append((span.start, span.end, is_beside))
        self.span = self.span if is_beside else Span(0, 0)
        await asyncio.sleep(self._take_s)
        if self._fault is not None:
            raise self._fault
        self.span = span

    async def see_off(self, within_s):
        self.seen_off.append(within_s)
        await asyncio.sleep(0.5)

    def figures(self):
        return NodeFigures(
            memory_bytes=1, memory_peak_bytes=2, free_bytes=self.free_bytes, busy_s=3.0, up_s=4.0,
            iterations=5, rows=6, pace_s=self.pace_s,
        )  # fmt: skip


class Ring:
    """A starter and its nodes on one memory network."""

    def __init__(self, wish):
        self.network = MemoryNetwork()
        self.said = []
        self.desk = RingDesk(identity(0).peer, MODEL)
        self.keeper = RingKeeper(self.desk, SIZES, wish, self.said.append)
        self.members, self.joined = {}, {}
        self.tasks = []

    async def start(self):
        transport = self.network.transport(identity(0).peer)

        async def serve(stream):
            channel, _ = await accept_channel(stream, PASS)
            try:
                await self.desk.serve(channel)
            except PeerUnreachable:
                pass  # how a node or a visitor leaves

        self.listener = await transport.listen(ListenAddress("memory", "starter", 1), serve)
        self.keeping = self.spawn(self.keeper.run())

    def spawn(self, work):
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def dial(self, number):
        transport = self.network.transport(identity(number).peer)
        return await open_channel(transport, self.listener.address, PURPOSE_RING, PASS)

    def join(self, number, work, **options):
        member = self.joined[number] = RingMember(work, f"node{number}", **options)
        self.members[number] = self.spawn(member.run(lambda: self.dial(number)))
        return work

    async def stop(self, number, within_s=30.0):
        """Tell a node to stop, as a signal does; returns how long it stayed."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        await self.joined[number].leave(within_s)
        self.members[number].cancel()
        self.network.crash(identity(number).peer)
        return clock() - began_s

    def crash(self, number):
        self.members[number].cancel()
        self.network.crash(identity(number).peer)

    async def spans(self, seconds=10.0):
        """What each serves, after a while."""
        await asyncio.sleep(seconds)
        channel = await self.dial(99)
        state = await ask_ring(channel)
        channel.close()
        return {
            one.name: (one.start, one.end) if one.state == "online" else one.state
            for one in state.nodes
        }


@asynccontextmanager
async def ring_of(*works, **wish):
    """A ring that waits for as many nodes as there are works."""
    ring = Ring(RingWish(num_nodes=wish.pop("num_nodes", len(works)), **wish))
    async with AsyncExitStack() as stack:
        await ring.start()
        for number, work in enumerate(works, 1):
            ring.join(number, work)
            await asyncio.sleep(0.1)  # so that their order is known
        yield ring
        await stack.aclose()
        for task in ring.tasks:
            task.cancel()
        await asyncio.gather(*ring.tasks, return_exceptions=True)


def virtual(story):
    """Run the test on virtual time."""

    def test():
        run_virtual(story())

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test
