"""Servers are lost: who replaces them, what is replayed, and who is left alone."""

import asyncio
from dataclasses import replace

import pytest

from shoal.base.errors import NoRouteError
from shoal.base.limits import RECORD_TTL_S
from shoal.lab.network import LinkConditions
from tests.simulation.scene import Scene, now_s, run_virtual, scene, until

CHAIN = "a 0:2, b 2:4, c 4:6, spare-a 0:2, spare-b 2:4, spare-c 4:6"


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_one_hop_is_lost(lost):
    """It alone is replaced and filled; the others keep their caches."""

    @scene(CHAIN)
    async def story(it):
        reader = await it.read(40)
        others = [name for name in "abc" if name != lost]
        before = {name: it.hop(name, reader).sequence for name in others}
        await it[lost].crash()
        await reader.decode(3)
        assert reader.chain == [f"spare-{n}" if n == lost else n for n in "abc"]
        assert reader.repairs == [([lost], [f"spare-{lost}"])]
        assert reader.session.recoveries[0].replayed_tokens == 40
        assert {name: it.hop(name, reader).sequence for name in others} == before

    story()


@pytest.mark.parametrize(("first", "second"), ["ab", "bc", "ac"])
def test_two_hops_are_lost(first, second):
    @scene(CHAIN)
    async def story(it):
        reader = await it.read(40)
        await it[first].crash()
        await it[second].crash()
        await reader.decode(3)
        lost = {first, second}
        assert reader.chain == [f"spare-{n}" if n in lost else n for n in "abc"]

    story()


@scene("a 0:2, b 2:4, c 4:6")
async def test_all_are_lost_and_come_back(it):
    """Everything is replayed from the client's own log."""
    reader = await it.read(40)
    for name in "abc":
        await it[name].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await asyncio.sleep(3.0)
    for name in "abc":
        await it[name].start()
    await step
    assert reader.chain == ["a", "b", "c"]
    assert it.hop("c", reader).inbound.have == 43


@scene(CHAIN)
async def test_a_lost_server_that_comes_back_at_once_is_filled_again(it):
    reader = await it.read(40)
    for name in ("spare-b", "b"):
        await it[name].crash()
    await it["b"].start()
    await reader.decode(3)
    assert reader.chain == ["a", "b", "c"]


@scene("a 0:2, b 2:4, c 4:6, spare-1 2:4, spare-2 2:4, spare-3 2:4")
async def test_the_replacement_dies_during_the_replay_and_so_does_the_next(it):
    reader = await it.read(320)
    sequences = [it.hop(name, reader).sequence for name in "ac"]
    await it["b"].crash()
    step = asyncio.ensure_future(reader.decode(1))
    died = ["b"]
    for _ in range(2):
        await until(lambda: 0 < replayed(it, reader) < 200)
        (name,) = [name for name in reader.chain if name.startswith("spare")]
        await it[name].crash()
        died.append(name)
    await step
    assert len(set(died)) == 3
    assert reader.chain[0::2] == ["a", "c"]
    assert reader.chain[1] not in died
    assert [it.hop(name, reader).sequence for name in "ac"] == sequences
    assert [it.name(peer) for one in reader.session.recoveries for peer in one.lost] == died


def replayed(it, reader):
    hops = [it.hop(name, reader) for name in it.servers if name.startswith("spare")]
    return max((hop.settled_length for hop in hops if hop is not None), default=0)


@scene("a 0:2, b 2:4, c 4:6, spare-b 2:4", iteration_s=0.2)
async def test_a_zombie_pushes_in_vain(it):
    """Cut off while it computes, replaced, and back: its rows are refused as stale, unless it
    has noticed the silence itself and given the link up."""
    reader = await it.read(10)
    step = asyncio.ensure_future(reader.decode(1))
    await until(lambda: bool(it.hop("b", reader).running))
    it.network.freeze(it["b"].peer)
    await step
    assert reader.chain == ["a", "spare-b", "c"]
    zombie = it.hop("b", reader)
    assert zombie.log.end == 11
    it.network.thaw(it["b"].peer)
    await until(lambda: not zombie.outbound.is_open, within_s=1.0)
    assert zombie.outbound.epoch < reader.session.epoch
    await reader.decode(5)
    assert reader.repairs == [(["b"], ["spare-b"])]
    freed_s = await until(lambda: not it.hops("b"))
    assert freed_s < 6.0


@pytest.mark.parametrize("detect_after_s", [0.0, None])
def test_a_server_is_lost_while_nobody_asks(detect_after_s):
    """With notice or without (no power): the next step works."""

    @scene(CHAIN)
    async def story(it):
        reader = await it.read(40)
        await asyncio.sleep(60)
        await it["b"].crash(detect_after_s)
        await asyncio.sleep(60)
        await reader.decode(2)
        assert reader.chain == ["a", "spare-b", "c"]
        assert reader.repairs == [(["b"], ["spare-b"])]

    story()


@scene("a 0:2, b 2:4, c 4:6, spare-b 2:4, spare-c 4:6")
async def test_our_own_link_is_cut(it):
    """Nobody is blamed or replaced, nothing is replayed; the session goes on."""
    reader = await it.read(40)
    await reader.decode(2)
    sequences = [it.hop(name, reader).sequence for name in "abc"]
    it.network.partition({it.client.me})
    step = asyncio.ensure_future(reader.decode(3))
    await asyncio.sleep(8.0)
    assert not step.done()
    it.network.partition()
    await step
    assert it.client.experience.snapshot(now_s()).avoid == frozenset()
    assert reader.chain == ["a", "b", "c"]
    assert reader.repairs == []
    assert [it.hop(name, reader).sequence for name in "abc"] == sequences
    assert not it.hops("spare-b")
    assert not it.hops("spare-c")


@pytest.mark.parametrize("is_open", [False, True], ids=["before", "meanwhile"])
def test_two_servers_cannot_reach_each_other(is_open):
    """Both reach the client: the rows go through it."""

    @scene("a 0:2, b 2:4")
    async def story(it):
        a, b = it["a"].peer, it["b"].peer
        reader = await it.read(20) if is_open else None
        it.network.isolate(a, [b])
        reader = reader or await it.read()
        await reader.decode(3)
        assert reader.chain == ["a", "b"]
        assert (a, b) in it.client.experience.snapshot(now_s()).unreachable_pairs
        assert it.client.experience.snapshot(now_s()).avoid == frozenset()
        relayed = it.network.traffic[it.client.me, b].frames
        await reader.decode(5)
        assert it.network.traffic[it.client.me, b].frames >= relayed + 5
        assert reader.repairs == []

    story()


@pytest.mark.parametrize("is_newer", [True, False], ids=["the-client-knows", "nobody-knows"])
def test_where_a_server_is_was_told_too_long_ago(is_newer):
    """It is not dialled then, which says nothing of the two: a route brings a newer record."""

    @scene("a 0:2, b 2:4")
    async def story(it):
        a, b = it["a"].peer, it["b"].peer
        reader = await it.read(20)
        await asyncio.sleep(RECORD_TTL_S + 1.0)
        if is_newer:
            it["b"].announce()
        sound, epoch = it.network.link(a, b), reader.session.epoch
        it.network.set_link(a, b, replace(sound, reset=1.0))  # it breaks, and is dialled again
        step = asyncio.ensure_future(reader.decode(3))
        await until(lambda: reader.session.epoch > epoch)
        it.network.set_link(a, b, sound)
        await step
        blamed = it.client.experience.snapshot(now_s()).unreachable_pairs
        assert blamed == (frozenset() if is_newer else {(a, b)})
        assert reader.chain == ["a", "b"]

    story()


def test_nobody_has_the_blocks():
    """After its patience the client names them."""

    async def story():
        async with Scene("a 0:2, late-b 2:5, c 5:6", patience_s=10.0) as it:
            with pytest.raises(NoRouteError, match=r"\[2,5\)") as caught:
                await it.read()
            assert caught.value.missing == ((2, 5),)
            assert 5.0 < now_s() <= 10.0

    run_virtual(story)


@scene("a 0:2, late-b 2:5, c 5:6")
async def test_the_missing_server_joins_within_the_patience(it):
    opening = asyncio.ensure_future(it.read(10))
    await asyncio.sleep(7.0)
    await it["late-b"].start()
    reader = await opening
    await reader.decode(3)
    assert reader.chain == ["a", "late-b", "c"]
    assert now_s() < 9.0


@scene("a 0:2, b 2:4, late-b 2:4, c 4:6")
async def test_a_lost_server_is_replaced_by_one_that_joins_later(it):
    reader = await it.read(10)
    await it["b"].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await asyncio.sleep(7.0)
    await it["late-b"].start()
    await step
    assert reader.chain == ["a", "late-b", "c"]


@scene(CHAIN, link=LinkConditions(delay_s=0.03, jitter_s=0.03, loss=0.02))
async def test_everybody_is_lost_one_after_the_other(it):
    reader = await it.read(40)
    for name in ("b", "a", "c"):
        await reader.decode(3)
        await it[name].crash()
    await reader.decode(3)
    assert reader.chain == ["spare-a", "spare-b", "spare-c"]


@pytest.mark.parametrize("back", ["spare-a", "spare-b", "spare-c"])
def test_only_the_slow_one_of_two_lost_servers_comes_back(back):
    """Nobody knows which: those that were tried most seldom are tried first."""

    async def story():
        async with Scene(CHAIN, patience_s=30.0) as it:
            reader = await it.read(40)
            for name in (back.removeprefix("spare-"), back):
                await it[name].crash()
            step = asyncio.ensure_future(reader.decode(3))
            await asyncio.sleep(3.0)
            await it[back].start()
            await step
            assert back in reader.chain

    run_virtual(story)


@scene(CHAIN)
async def test_all_are_lost_and_the_slow_ones_come_back(it):
    reader = await it.read(40)
    for name in it.servers:
        await it[name].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await asyncio.sleep(3.0)
    for name in ("spare-a", "b", "spare-c"):
        await it[name].start()
    await step
    assert reader.chain == ["spare-a", "b", "spare-c"]


@scene("a 0:2, b 2:4, c 4:6, spare-a 0:2")
async def test_what_was_replayed_is_counted_though_the_repair_takes_two_routes(it):
    """While the first one waits for a server that does not answer, the replay is done."""
    reader = await it.read(40)
    it.network.freeze(it["c"].peer)
    await it["a"].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await until(lambda: replayed(it, reader) >= 40)
    await asyncio.sleep(6.0)
    it.network.thaw(it["c"].peer)
    await step
    assert reader.repairs == [(["a"], ["spare-a"])]
    assert reader.session.recoveries[0].replayed_tokens == 40


@scene(CHAIN)
async def test_one_dies_while_another_stands_still(it):
    """The repair does not wait out the deadline of a call to the one that only seems to live."""
    reader = await it.read(40)
    await reader.decode(2)
    it.network.freeze(it["c"].peer)
    await it["a"].crash()
    started_s = now_s()
    await reader.decode(1)
    assert reader.chain == ["spare-a", "b", "spare-c"]
    assert now_s() - started_s < 3.0


@scene("a 0:2, b 2:4, spare 2:4")
async def test_steps_that_always_take_long_are_no_standstill(it):
    reader = await it.read(10)
    for name in ("a", "b", "spare"):
        it[name].slowness = 800.0
    await reader.decode(3)
    started_s, before = now_s(), reader.session.recoveries
    await reader.decode(5)
    step_s = (now_s() - started_s) / 5
    assert step_s > 2.5
    assert reader.state.resync_after_s > 1.5 * step_s
    assert reader.session.recoveries == before


@pytest.mark.parametrize("kind", ["held", "swallowed", "swallowed one way"])
def test_a_silent_cut_between_two_servers_is_passed_in_time(kind):
    """As soon as a server that falls silent: the rows then go through the client."""

    @scene("a 0:2, b 2:4, c 4:6")
    async def story(it):
        a, b = it["a"].peer, it["b"].peer
        reader = await it.read(20)
        await reader.decode(2)
        if kind == "held":
            it.network.isolate(a, [b])
        else:
            it.network.black_hole(a, b)
        if kind == "swallowed":
            it.network.black_hole(b, a)
        since_s = now_s()
        await reader.decode(1)
        assert now_s() - since_s <= 3.0
        await reader.decode(5)
        assert reader.chain == ["a", "b", "c"]
        assert reader.repairs == []
        assert it.client.experience.snapshot(now_s()).avoid == frozenset()

    story()
