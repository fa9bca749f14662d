"""Planned moves: make before break, and nobody waits for more than a step or two."""

import asyncio
from itertools import pairwise

import pytest

from shoal.base.errors import PeerBusy
from shoal.base.spans import Span
from shoal.client.tending import TendConfig
from tests.simulation.scene import now_s, scene, until

PAIR = "a 0:2, b 2:4, spare-b 2:4"


def longest_gap(times):
    return max(after - before for before, after in pairwise(times))


async def decode_timed(reader, count):
    """Loop time of each of so many steps."""
    times = [now_s()]
    for _ in range(count):
        await reader.decode(1)
        times.append(now_s())
    return times


@scene(PAIR)
async def test_a_draining_server_hands_its_sessions_over(it):
    reader = await it.read(100)
    steady = longest_gap(await decode_timed(reader, 20))
    draining = asyncio.ensure_future(it["b"].server.drain(30.0))
    times = await decode_timed(reader, 60)
    assert await draining
    assert reader.chain == ["a", "spare-b"]
    assert it.hops("b") == []
    assert reader.session.recoveries == ()
    (move,) = reader.session.moves
    assert move.reason == "leaving"
    after = longest_gap(await decode_timed(reader, 20))
    assert longest_gap(times) <= max(steady, after) + 2 * after


@scene(PAIR)
async def test_an_idle_session_is_handed_over_too(it):
    reader = await it.read(50)
    assert await it["b"].server.drain(30.0)
    assert reader.chain == ["a", "spare-b"]
    await reader.decode(5)
    assert reader.session.recoveries == ()


@scene(PAIR)
async def test_a_draining_server_takes_nothing_new(it):
    await it["spare-b"].server.drain(30.0)
    reader = await it.read(10)
    assert reader.chain == ["a", "b"]
    await it["b"].crash()
    link = it.client.link(it["spare-b"].peer)
    with pytest.raises(PeerBusy, match="leaving"):
        raise await refusal(it, reader, link)
    await it["b"].start()
    await reader.decode(3)


async def refusal(it, reader, link):
    await until(lambda: reader.state.trouble or reader.state.is_mending)
    await link.connect(rows=False)
    stages = [stage for stage in reader.state.chain if it.name(stage.peer) == "a"]
    try:
        await it["spare-b"].server._open_hop(_plan(it, reader, stages), None)
    except PeerBusy as error:
        return error
    return AssertionError("it was taken")


def _plan(it, reader, stages):
    from shoal.server.session import HopPlan

    return HopPlan(
        session=reader.session.id,
        owner=it.client.me,
        opened_ms=1,
        epoch=99,
        span=Span(2, 4),
        predecessor=stages[0].peer,
        successor=it.client.me,
        is_last=True,
        encoding="float32",
    )


@scene("a 0:2, b 2:4")
async def test_who_can_go_nowhere_stays_until_the_end(it):
    reader = await it.read(20)
    assert not await it["b"].server.drain(5.0)
    await reader.decode(5)
    assert reader.chain == ["a", "b"]
    assert reader.session.moves == ()


@scene("late-a 0:4, b 2:4, c 0:2")
async def test_a_server_extends_its_hop_from_its_own_log(it):
    """The neighbour has the blocks as well: its own log feeds them, nothing goes back to us."""
    reader = await it.read(60)
    await it["late-a"].start()
    await it["c"].server.drain(30.0)
    assert reader.chain == ["late-a", "b"]
    first = it.hop("late-a", reader)
    assert await it["b"].server.drain(30.0)
    assert reader.chain == ["late-a", "late-a"]
    assert first in it.hops("late-a")
    await reader.decode(10)
    assert {str(hop.plan.span) for hop in it.hops("late-a")} == {"[0,2)", "[2,4)"}


@scene(PAIR, tending=TendConfig(is_moving=False))
async def test_without_moves_a_drained_server_is_repaired(it):
    reader = await it.read(50)
    assert not await it["b"].server.drain(1.0)
    await it["b"].crash()
    await reader.decode(5)
    assert reader.chain == ["a", "spare-b"]
    assert reader.session.moves == ()


@scene("a 0:2, b 2:4, c 2:4")
async def test_a_slow_server_is_left(it):
    reader = await it.read(50)
    slow, fast = ("b", "c") if "b" in reader.chain else ("c", "b")
    it[slow].slowness = 10.0
    for _ in range(2000):
        await reader.decode(1)
        if reader.session.moves:
            break
    (move,) = reader.session.moves
    assert move.reason == "slow"
    assert reader.chain == ["a", fast]
    assert reader.session.recoveries == ()


@scene("a 0:2, b 2:4, c 2:4")
async def test_nobody_moves_to_a_server_that_does_not_answer(it):
    reader = await it.read(50)
    slow, dead = ("b", "c") if "b" in reader.chain else ("c", "b")
    epoch = reader.state.epoch
    await it.client.decode_s_per_block(it[dead].peer)  # it is known, and near
    it.network.freeze(it[dead].peer)
    it[slow].slowness = 10.0
    await reader.decode(400)
    assert reader.state.epoch == epoch
    assert reader.state.unfit_times == {}
    assert reader.session.moves == ()


@scene("a 0:2, b 2:4, spare-b 2:4")
async def test_the_new_hop_dies_before_it_is_ready(it):
    reader = await it.read(100)
    it["spare-b"].slowness = 50.0
    draining = asyncio.ensure_future(it["b"].server.drain(30.0))
    await until(lambda: it.hop("spare-b", reader) is not None)
    await it["spare-b"].crash()
    await reader.decode(10)
    assert reader.chain == ["a", "b"]
    assert not await draining


@scene("a 0:2, b 2:4, spare-b 2:4")
async def test_the_old_hop_dies_while_the_new_one_gets_ready(it):
    reader = await it.read(100)
    it["spare-b"].slowness = 20.0
    draining = asyncio.ensure_future(it["b"].server.drain(30.0))
    await until(lambda: it.hop("spare-b", reader) is not None)
    held = it.hop("spare-b", reader)
    draining.cancel()
    await it["b"].crash()
    await reader.decode(5)
    assert reader.chain == ["a", "spare-b"]
    assert it.hop("spare-b", reader) is held, "what it held by then was used"


@scene("late-a 0:4, b 2:4, c 0:2", cache_tokens=80)
async def test_two_hops_that_do_not_fit_beside_each_other_become_one(it):
    """The neighbour can't hold the session twice: when nothing moves, it computes it as one hop."""
    reader = await it.read(20)
    await it["late-a"].start()
    await it["c"].server.drain(30.0)
    assert reader.chain == ["late-a", "b"]
    await it["b"].crash()
    await reader.decode(10)
    assert reader.chain == ["late-a", "late-a"]
    await reader.prefill(40)
    await reader.decode(5)
    assert reader.chain == ["late-a"]


@scene(PAIR)
async def test_who_is_not_ready_in_time_is_moved_to_all_the_same(it):
    """The leaver said when it goes: the rest is replayed by the hop before it, no repair."""
    reader = await it.read(400)
    it["spare-b"].slowness = 200.0
    assert await it["b"].server.drain(5.0)
    await it["b"].crash()
    it["spare-b"].slowness = 1.0
    await reader.decode(5)
    assert reader.chain == ["a", "spare-b"]
    (move,) = reader.session.moves
    assert move.prepared_s <= 5.0
    assert reader.session.recoveries == ()
