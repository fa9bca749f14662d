"""The starter's desk and decisions, and nodes that follow them, over streams in memory."""

import asyncio

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.ring import NodeSpec
from shoal.plan.ring_repair import NodeView, Task, growing_first
from shoal.plan.spec import DecodeTimes
from shoal.wire.ring import JoinRing, Measured, RingReport
from tests.unit.discovery_cases import identity
from tests.unit.ring_cases import MIB, Work, ring_of, virtual


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
