"""The starter's desk: ends, losses, visitors and what it must not believe."""

import asyncio
from contextlib import suppress

import msgspec
import pytest

from shoal.base.errors import PeerBusy, PeerUnreachable
from shoal.client.ring import ask_ring
from shoal.lab.clock import run_virtual
from shoal.net.address import ListenAddress
from shoal.net.channel import PURPOSE_RING, accept_channel, open_channel
from shoal.net.memory import MemoryNetwork
from shoal.plan.spec import DecodeTimes
from shoal.server import ring_desk
from shoal.server.ring_desk import RingDesk
from shoal.server.ring_keeper import RingKeeper, RingWish
from shoal.server.ring_node import RingMember
from shoal.wire.messages import Ping
from shoal.wire.ring import JoinRing, Measured, RingReport
from tests.unit.discovery_cases import identity
from tests.unit.ring_cases import MIB, MODEL, PASS, SIZES, Work, ring_of, virtual


@virtual
async def test_the_end_is_told_to_all():
    async with ring_of(Work(), Work()) as ring:
        await ring.spans()
        await ring.desk.end("enough", 5.0)
        for number in (1, 2):
            assert await ring.members[number] == "enough"
        late = RingMember(Work(), "late")
        with pytest.raises(PeerBusy, match="no more nodes"):
            await late.run(lambda: ring.dial(9))


@virtual
async def test_a_starter_that_is_lost_is_looked_for_and_then_given_up():
    async with ring_of(Work(), num_nodes=1) as ring:
        await ring.spans()
        started_s = asyncio.get_running_loop().time()
        ring.keeping.cancel()
        ring.network.crash(identity(0).peer)
        with pytest.raises(PeerUnreachable):
            await ring.members[1]
        assert 15 <= asyncio.get_running_loop().time() - started_s < 30


@virtual
async def test_a_starter_that_comes_back_with_another_model_finds_nobody():
    async with ring_of(Work(), num_nodes=1) as ring:
        await ring.spans()
        ring.desk = RingDesk(identity(0).peer, msgspec.structs.replace(MODEL, dtype="bfloat16"))
        ring.network.crash(identity(1).peer)
        await asyncio.sleep(5)
        assert ring.members[1].done()
        with pytest.raises(PeerUnreachable, match="another ring"):
            await ring.members[1]


@virtual
async def test_a_silent_node_is_lost():
    async with ring_of(Work(), num_nodes=2) as ring:
        channel = await ring.dial(7)
        await channel.send(JoinRing("mute"))
        await asyncio.sleep(ring_desk.SILENCE_S + 1)
        assert (await ring.spans(1))["mute"] == "lost"


@pytest.mark.parametrize("nonsense", [Ping(1), RingReport(0, "online")])
def test_nonsense_ends_a_stream(nonsense):
    async def story():
        async with ring_of(num_nodes=1) as ring:
            channel = await ring.dial(7)
            await channel.send(nonsense)
            answer, _ = await channel.receive()
            assert answer.code == "protocol"

    run_virtual(story())


@pytest.mark.parametrize("times", [[], [(0, 0.1)], [(2, 0.1), (1, 0.1)], [(1, 0.1), (1, 0.1)]])
def test_times_that_no_split_can_be_made_of_end_the_stream_not_the_ring(times):
    async def story():
        async with ring_of(Work(), num_nodes=2) as ring:
            channel = await ring.dial(7)
            await channel.send(JoinRing("odd"))
            await channel.receive()
            await channel.send(Measured(200 * MIB, times, 0.001))
            answer, _ = await channel.receive()
            assert answer.code == "protocol"
            ring.join(2, Work())
            found = await ring.spans()
            assert (found["node1"], found["node2"]) == ((0, 6), (6, 12))

    run_virtual(story())


@virtual
async def test_visitors_are_counted():
    async with ring_of(num_nodes=1) as ring:
        held = [await ring.dial(20 + number) for number in range(ring_desk.VISITORS_MAX)]
        for channel in held:
            await ask_ring(channel)
        with pytest.raises(PeerBusy):
            await ask_ring(await ring.dial(7))
        held[0].close()
        await asyncio.sleep(1)
        assert (await ask_ring(await ring.dial(8))).nodes == []


@virtual
async def test_equal_names_get_numbers():
    async with ring_of(num_nodes=3) as ring:
        for number in (1, 2):
            ring.spawn(RingMember(Work(), "board").run(lambda n=number: ring.dial(n)))
        assert set(await ring.spans()) == {"board", "board-2"}


def test_reports_travel():
    report = RingReport(3, "online", 2, 5, "", 1, 2, 3, 0.5, 1.0, 7, 8, 0.01)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=RingReport) == report


@pytest.mark.parametrize(("head_s", "counts"), [(0.0, (6, 6)), (0.04, (4, 8))])
def test_the_starter_gets_fewer_blocks_by_what_its_head_took(head_s, counts):
    async def story():
        network, desk = MemoryNetwork(), RingDesk(identity(0).peer, MODEL)
        head = DecodeTimes(points=((1, head_s),))
        keeper = RingKeeper(desk, SIZES, RingWish(num_nodes=1, starter_blocks=None), print, head)

        async def serve(stream):
            with suppress(PeerUnreachable):
                await desk.serve((await accept_channel(stream, PASS))[0])

        listener = await network.transport(identity(0).peer).listen(
            ListenAddress("memory", "starter", 1), serve
        )

        def dial(number):
            transport = network.transport(identity(number).peer)
            return lambda: open_channel(transport, listener.address, PURPOSE_RING, PASS)

        works = [Work(), Work()]
        tasks = [asyncio.ensure_future(keeper.run())]
        for number, work in enumerate(works):
            tasks.append(asyncio.ensure_future(RingMember(work, "n").run(dial(number))))
        await asyncio.sleep(5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return tuple(len(work.span) for work in works)

    assert run_virtual(story) == counts
