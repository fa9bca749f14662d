"""A server goes to other blocks while clients read over it: no row is wrong, none is lost."""

import asyncio
import random

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from tests.simulation.scene import scene, until


@scene("a 0:2, b 2:4, spare-b 2:4, c 4:6")
async def test_owners_are_asked_and_move_before_anything_is_lost(it):
    reader = await it.read(prompt=20)
    assert it.hop("b", reader)
    moving = asyncio.ensure_future(it["b"].move(Span(4, 6), leave_s=10.0))
    await reader.decode(12, pause_s=0.2)
    assert await moving
    assert it.hop("spare-b", reader)
    assert reader.repairs == []
    late = await it.read(prompt=5)
    assert not it.hop("b", late) or it.hop("b", late).plan.span == Span(4, 6)


@scene("a 0:2, b 2:4, late-b 2:4, c 4:6")
async def test_running_sessions_stay_until_the_deadline_then_go_on_elsewhere(it):
    reader = await it.read(prompt=20)
    moving = asyncio.ensure_future(it["b"].move(Span(4, 6), leave_s=4.0))
    await reader.decode(10, pause_s=0.2)
    assert it.hop("b", reader).plan.span == Span(2, 4)  # switched at 1 s, and still served
    assert it["b"].server.sessions.retired
    await until(lambda: moving.done())
    assert not it["b"].server.sessions.retired
    await it["late-b"].start()
    await reader.decode(5)
    assert it.hop("late-b", reader)


@scene("a 0:2, b 2:4, c 4:6")
async def test_a_session_that_closes_in_time_ends_the_move(it):
    reader = await it.read(prompt=8)
    moving = asyncio.ensure_future(it["b"].move(Span(4, 6), leave_s=60.0))
    await reader.decode(8, pause_s=0.2)
    reader.session.close()
    it.readers.remove(reader)
    async with asyncio.timeout(2.0):
        assert await moving


@scene("a 0:2, spare-a 0:2, b 2:5, late-b 2:5")
async def test_a_session_on_old_blocks_may_still_be_routed_and_forked(it):
    reader = await it.read(prompt=8)
    moving = asyncio.ensure_future(it["b"].move(Span(0, 3), leave_s=8.0))
    await reader.decode(8, pause_s=0.2)
    await it["a"].crash()
    await reader.decode(3)
    child = await reader.fork(6)
    await child.decode(2)
    old = {hop.plan.session for hop in it.hops("b") if hop.plan.span == Span(2, 5)}
    assert old == {reader.session.id, child.session.id}
    assert not moving.done()
    await it["late-b"].start()
    await asyncio.gather(*(one.decode(40, pause_s=0.2) for one in (reader, child)))
    assert await moving
    assert it.hop("late-b", reader)
    assert it.hop("late-b", child)


@scene("a 0:2, b 2:4, spare-b 2:4, c 4:6", cache_tokens=160)
async def test_a_move_under_a_full_cache_does_not_hurt_either_side(it):
    readers = [await it.read(prompt=40) for _ in range(3)]
    moving = asyncio.ensure_future(it["b"].move(Span(4, 6), leave_s=4.0))
    await asyncio.sleep(1.5)
    readers += [await it.read(prompt=40) for _ in range(3)]
    await asyncio.gather(*(reader.decode(20, pause_s=0.2) for reader in readers))
    assert await moving


@scene("a 0:2, b 2:4, c 4:6")
async def test_a_move_that_fails_changes_nothing(it):
    reader = await it.read(prompt=8)
    for trouble in (
        {"fault": ConfigError("no room")},
        {"fault": RuntimeError("can't allocate memory")},
        {"page_tokens": 64},
    ):
        moving = asyncio.ensure_future(it["b"].move(Span(4, 6), **trouble))
        await reader.decode(8, pause_s=0.2)
        assert not await moving
    assert it.hop("b", reader).plan.span == Span(2, 4)
    assert await it["b"].move(Span(2, 6))
    await reader.decode(3)


def wander(seed):
    """Servers that move at random, evictions and a tight cache, under three readers."""
    servers = "a 0:3, b 3:6, c 0:3, d 2:5, e 3:6, spare-x 0:3, spare-y 3:6"

    @scene(servers, cache_tokens=400, seed=seed)
    async def story(it):
        rng = random.Random(seed)
        done = False
        left = []

        async def read():
            reader = await it.read(prompt=rng.randint(1, 30), seed=rng.random())
            for _ in range(20):
                await reader.decode(rng.randint(1, 4), pause_s=rng.uniform(0.0, 0.3))
                if rng.random() < 0.2:
                    await reader.verify(rng.randint(2, 5))

        async def move(name):
            while not done:
                await asyncio.sleep(rng.uniform(0.2, 3.0))
                length = len(it[name].spec.span)
                start = rng.randint(0, 6 - length)
                leave_s = rng.choice([0.0, 0.3, 5.0])
                moving = it[name].move(
                    Span(start, start + length), load_s=rng.uniform(0, 1), leave_s=leave_s
                )
                left.extend(it.hops(name))
                await moving
                if rng.random() < 0.3:
                    it[name].server.evict_all()

        # The spares stay, so there is always a way.
        moving = [asyncio.ensure_future(move(name)) for name in "abcde"]
        await asyncio.gather(*(read() for _ in range(3)))
        done = True
        await asyncio.gather(*moving)
        assert left, "nobody was there to be moved"

    return story


@pytest.mark.parametrize("seed", range(3))
def test_wandering_servers_never_change_a_row(seed):
    wander(seed)()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 30))
def test_more_wandering_servers(seed):
    wander(seed)()
