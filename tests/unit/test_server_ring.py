"""The starter's desk and decisions, and nodes that follow them, over streams in memory."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import pytest

from shoal.base.errors import ConfigError, PeerBusy, PeerUnreachable
from shoal.base.spans import Span
from shoal.client.ring import ask_ring
from shoal.lab.clock import run_virtual
from shoal.net.address import ListenAddress
from shoal.net.channel import PURPOSE_RING, accept_channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.plan.ring import NodeSpec
from shoal.plan.ring import RingModel as Sizes
from shoal.plan.ring_repair import NodeView, Task, growing_first
from shoal.plan.spec import DecodeTimes
from shoal.server import ring_desk
from shoal.server.ring_desk import RingDesk
from shoal.server.ring_keeper import RingKeeper, RingWish
from shoal.server.ring_node import NodeFigures, RingMember
from shoal.wire.messages import Ping
from shoal.wire.ring import JoinRing, Measured, RingModel, RingReport
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


@virtual
async def test_blocks_are_dealt_out_by_speed_when_all_are_here():
    async with ring_of(Work(0.01), Work(0.02), Work(0.01)) as ring:
        assert await ring.spans() == {"node1": (0, 5), "node2": (5, 7), "node3": (7, 12)}
        assert ring.keeper.up.is_set()
        assert ring.said[-1].startswith("the ring is up: node1 [0,5) -> node2 [5,7)")


@virtual
async def test_a_split_by_hand():
    async with ring_of(Work(), Work(), split=(2, 10)) as ring:
        assert await ring.spans() == {"node1": (0, 2), "node2": (2, 12)}


@virtual
async def test_who_comes_late_stands_by_and_replaces_who_dies():
    async with ring_of(Work(), Work()) as ring:
        await ring.spans()
        spare = ring.join(3, Work())
        assert (await ring.spans())["node3"] == "spare"
        assert "node3 is a spare" in ring.said
        ring.crash(2)
        found = await ring.spans()
        assert found == {"node1": (0, 6), "node3": (6, 12), "node2": "lost"}
        assert spare.told == [(6, 12, True)]
        assert "blocks [6,12) are served by nobody now" in ring.said


@virtual
async def test_who_is_told_to_stop_goes_when_a_spare_has_its_blocks():
    works = [Work(), Work()]
    async with ring_of(*works) as ring:
        await ring.spans()
        spare = ring.join(3, Work(take_s=4.0))
        await ring.spans()
        stayed_s = await ring.stop(2)
        assert spare.span == Span(6, 12)
        assert 4.0 < stayed_s < 6.0
        assert works[1].seen_off[0] == pytest.approx(26.0, abs=1.0)
        assert works[1].told == [(6, 12, True)]  # it served them to the end
        assert await ring.spans() == {"node1": (0, 6), "node3": (6, 12), "node2": "lost"}
        assert "node2 leaves: others have its blocks" in ring.said
        assert not any("served by nobody" in text for text in ring.said)


@virtual
async def test_who_is_told_to_stop_goes_when_the_others_have_its_blocks():
    works = [Work(), Work(), Work()]
    async with ring_of(*works) as ring:
        await ring.spans()
        for work in works:
            work.free_bytes = 500 * MIB
        await asyncio.sleep(2.0)
        assert await ring.stop(2) < 5.0
        assert await ring.spans() == {"node1": (0, 6), "node3": (6, 12), "node2": "lost"}
        assert not any("served by nobody" in text for text in ring.said)


@virtual
async def test_whose_blocks_nobody_can_take_goes_in_the_end():
    works = [Work(memory=70 * MIB), Work(memory=70 * MIB)]
    async with ring_of(*works) as ring:
        await ring.spans()
        assert await ring.stop(2, 20.0) == pytest.approx(20.0)
        assert works[1].seen_off == []
        assert any("nobody can take the blocks of node2" in text for text in ring.said)


@virtual
async def test_a_spare_that_is_told_to_stop_goes_at_once():
    async with ring_of(Work(), num_nodes=1) as ring:
        await ring.spans()
        ring.join(2, Work())
        await ring.spans()
        assert await ring.stop(2) == 0.0


@virtual
async def test_without_a_spare_the_others_take_over():
    async with ring_of(Work(), Work(), Work()) as ring:
        await ring.spans()
        ring.crash(2)
        assert await ring.spans() == {"node1": (0, 6), "node3": (6, 12), "node2": "lost"}


@virtual
async def test_too_few_are_left_until_somebody_comes():
    async with ring_of(*[Work(memory=45 * MIB) for _ in range(3)]) as ring:
        await ring.spans()
        ring.crash(1)
        await ring.spans()
        assert sum("can't hold the model" in text for text in ring.said) == 1
        ring.join(4, Work(memory=45 * MIB))
        assert (await ring.spans())["node4"] == (0, 4)
        assert ring.keeper.up.is_set()


@virtual
async def test_a_link_that_hiccups_moves_nothing():
    async with ring_of(Work(), Work()) as ring:
        await ring.spans()
        turn = ring.desk.turn
        ring.network.crash(identity(2).peer)
        assert await ring.spans() == {"node1": (0, 6), "node2": (6, 12)}
        assert ring.desk.turn == turn


@virtual
async def test_a_link_that_breaks_while_a_node_measures_does_not_begin_it_anew():
    work = Work()
    async with ring_of(num_nodes=1) as ring:
        ring.join(1, work)
        await asyncio.sleep(0.2)
        ring.network.crash(identity(1).peer)
        assert await ring.spans() == {"node1": (0, 12)}
        assert work.measured == 1


@virtual
async def test_a_task_of_before_a_link_broke_is_not_carried_out():
    work = Work(take_s=5.0)
    async with ring_of(work, num_nodes=1) as ring:
        await asyncio.sleep(2)
        assert work.told == [(0, 12, True)]
        node = ring.desk.nodes[identity(1).peer]
        ring.desk.tell(node, Span(3, 5), is_beside=True)
        await asyncio.sleep(0.1)
        ring.network.crash(identity(1).peer)
        await asyncio.sleep(2)
        again = ring.desk.nodes[identity(1).peer]
        assert again is not node
        assert (again.span, again.is_settled) == (Span(0, 12), False)
        assert await ring.spans(10) == {"node1": (0, 12)}
        assert again.is_settled
        assert work.told == [(0, 12, True)]


@virtual
async def test_blocks_that_a_node_does_not_serve_after_all_are_given_again():
    async with ring_of(Work(), num_nodes=2) as ring:
        channel = await ring.dial(7)
        await channel.send(JoinRing("odd"))
        await channel.receive()
        await channel.send(Measured(200 * MIB, [(1, 0.01)], 0.001))
        task = (await channel.receive())[0]
        assert (task.start, task.end) == (6, 12)
        await channel.send(RingReport(task.task, "online", 8, 12))
        again = (await channel.receive())[0]
        assert (again.task, again.start, again.end) == (task.task + 1, 6, 12)
        await channel.send(RingReport(again.task, "online", 6, 12))
        assert await ring.spans(2) == {"node1": (0, 6), "odd": (6, 12)}
        assert ring.keeper.up.is_set()


@virtual
async def test_who_can_not_take_its_blocks_is_passed_over():
    async with ring_of(Work(), Work(fault=ConfigError("disk full")), num_nodes=2) as ring:
        assert await ring.spans() == {"node1": (0, 12), "node2": "failed"}
        assert "node2 can't take its blocks: disk full" in ring.said


@virtual
async def test_who_fails_to_take_more_keeps_what_it_serves():
    works = [Work(), Work(), Work()]
    async with ring_of(*works) as ring:
        await ring.spans()
        works[0].free_bytes, works[0]._fault = 500 * MIB, ConfigError("no room after all")
        ring.crash(2)
        found = await ring.spans(20)
        assert found == {"node1": "failed", "node3": (4, 12), "node2": "lost"}
        assert works[0].span == Span(0, 4)
        assert ring.keeper.up.is_set()


@virtual
async def test_who_can_not_do_anything_says_why_and_leaves():
    async with ring_of(Work(), num_nodes=2) as ring:
        ring.join(2, Work(bad=ConfigError("one block needs more than there is")))
        await asyncio.sleep(3)
        with pytest.raises(ConfigError, match="one block needs"):
            await ring.members[2]
        assert any("one block needs more" in text for text in ring.said)


@virtual
async def test_a_ring_that_can_not_hold_the_model_ends_with_the_numbers():
    async with ring_of(Work(memory=MIB), Work(memory=2 * MIB)) as ring:
        await asyncio.sleep(5)
        with pytest.raises(ConfigError, match="node1 1 MiB, node2 2 MiB"):
            await ring.keeping


@virtual
async def test_a_node_that_has_become_slow_is_told_of():
    works = [Work(), Work()]
    async with ring_of(*works) as ring:
        await ring.spans()
        works[0].pace_s, works[1].pace_s = 0.03, 0.01
        await asyncio.sleep(15)
        assert "node1 is slower than planned: blocks 3,9" in ring.desk.proposal
        assert not any("slower" in text for text in ring.said)
        await asyncio.sleep(60)
        assert sum("slower" in text for text in ring.said) == 1
        assert await ring.spans() == {"node1": (0, 6), "node2": (6, 12)}


@virtual
async def test_a_ring_may_split_itself_anew_who_gets_more_first():
    works = [Work(), Work()]
    async with ring_of(*works, is_resplitting=True) as ring:
        await ring.spans()
        for work, pace_s in zip(works, (0.03, 0.01), strict=True):
            work.pace_s, work.free_bytes = pace_s, 500 * MIB
        assert await ring.spans(60) == {"node1": (0, 3), "node2": (3, 12)}
        assert works[1].told == [(6, 12, True), (3, 12, True)]
        assert works[0].told == [(0, 6, True), (0, 3, True)]


@virtual
async def test_who_gets_less_stays_when_who_gets_more_fails():
    works = [Work(), Work()]
    async with ring_of(*works, is_resplitting=True) as ring:
        await ring.spans()
        for work, pace_s in zip(works, (0.03, 0.01), strict=True):
            work.pace_s, work.free_bytes = pace_s, 500 * MIB
        works[1]._fault = ConfigError("no room after all")
        assert await ring.spans(60) == {"node1": (0, 6), "node2": "failed"}
        assert works[0].told == [(0, 6, True)]
        assert not any("served by nobody" in text for text in ring.said)


def test_blocks_are_left_when_others_have_taken_them():
    def order(before, after):
        peers = [identity(number).peer for number in range(len(before))]
        spec = Measured(1, [(1, 0.01)], 0.0).decode_s_by_batch
        nodes = [
            NodeView(
                spec=NodeSpec(
                    peer=peer, name="x", memory_bytes=1, decode=DecodeTimes(points=tuple(spec))
                ),
                span=span,
            )
            for peer, span in zip(peers, before, strict=True)
        ]
        tasks = [
            Task(peer=peer, span=span, is_beside=True)
            for peer, span in zip(peers, after, strict=True)
        ]
        return [peers.index(task.peer) for task in growing_first(nodes, tasks)]

    thirds = [Span(0, 4), Span(4, 8), Span(8, 12)]
    assert order(thirds, [Span(0, 2), Span(2, 6), Span(6, 12)]) == [2, 1, 0]
    assert order(thirds, [Span(0, 6), Span(6, 10), Span(10, 12)]) == [0, 1, 2]
    assert order([*thirds, None], [Span(0, 1), None, Span(1, 4), Span(4, 12)]) == [3, 1, 2, 0]


@virtual
async def test_a_resplit_moves_everybody_once_and_no_block_is_without_a_node():
    works = [Work(), Work(), Work()]
    async with ring_of(*works, is_resplitting=True) as ring:
        await ring.spans()
        for work, pace_s in zip(works, (0.03, 0.02, 0.01), strict=True):
            work.pace_s, work.free_bytes = pace_s, 500 * MIB
        assert await ring.spans(90) == {"node1": (0, 2), "node2": (2, 5), "node3": (5, 12)}
        assert [len(work.told) for work in works] == [2, 2, 2]
        assert not any("served by nobody" in text for text in ring.said)


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
