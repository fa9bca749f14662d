"""Too little memory: who gives way, who comes back when, and that everybody gets on."""

import asyncio
import random
from dataclasses import replace

import pytest

from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.quotas import Quotas
from shoal.server.sessions import RETURN_MARGIN_TOKENS
from tests.simulation.scene import Scene, now_s, run_virtual, scene, until

PAGE = 16
"""Tokens."""

PAIR = "a 0:2, b 2:4, spare-a 0:2"
ROW_BYTES = 64
ALONE = ServerConfig(quotas=Quotas(cache_share=1.0))


async def in_turn(it, lengths):
    """Sessions of a client each, the oldest first."""
    readers = []
    for seed, length in enumerate(lengths):
        client = await it.swarm.open_client()
        readers.append(await it.read(length, client=client, seed=seed))
        await asyncio.sleep(0.01)
    return readers


def parked(it, name, readers):
    """Numbers of those without a cache at the server."""
    hops = [it.hop(name, reader) for reader in readers]
    return [index for index, hop in enumerate(hops) if hop is not None and hop.is_parked]


# --- who gives way --------------------------------------------------------------------


@scene(PAIR, cache_tokens=16 * PAGE, config=ALONE)
async def test_the_youngest_gives_way_on_every_server_and_after_a_repair(it):
    readers = await in_turn(it, [3 * PAGE] * 5)
    assert parked(it, "a", readers) == parked(it, "b", readers) == []
    await readers[0].decode(2 * PAGE)
    assert parked(it, "a", readers) == parked(it, "b", readers) == [4]
    await it["a"].crash()
    await readers[0].decode(PAGE)
    assert readers[0].chain == ["spare-a", "b"]
    await readers[1].decode(2 * PAGE)
    assert parked(it, "b", readers) == [3, 4]
    await until(lambda: it.hop("spare-a", readers[3]) is not None)
    await readers[0].decode(2 * PAGE)
    assert set(parked(it, "spare-a", readers)) <= set(parked(it, "b", readers)) == {3, 4}


@scene("a 0:4", cache_tokens=16 * PAGE, config=ALONE)
async def test_an_evicted_session_returns_only_when_its_whole_length_and_a_margin_fit(it):
    old, young = await in_turn(it, [6 * PAGE, 8 * PAGE])
    table = it["a"].server.sessions
    hop = it.hop("a", young)
    await old.decode(3 * PAGE)
    assert hop.is_parked
    step = asyncio.ensure_future(young.decode(1))
    fits_beside = 16 * PAGE - (8 * PAGE + RETURN_MARGIN_TOKENS)
    while old.session.length > fits_beside:
        await asyncio.sleep(0.5)
        assert hop.is_parked, "returned though its length and a margin don't fit"
        old.truncate(old.session.length - PAGE)
        await old.decode(1)
    await until(lambda: not hop.is_parked, within_s=5.0)
    await step
    assert table.ledger.held(hop.sequence) >= table.ledger.pages(8 * PAGE + 1)
    assert not it.hop("a", old).is_parked


@scene("a 0:4", cache_tokens=16 * PAGE, config=ALONE)
async def test_an_idle_session_that_was_evicted_keeps_quiet_until_its_next_row(it):
    """No replay, so no rows, until somebody wants something of it."""
    old, young = await in_turn(it, [6 * PAGE, 8 * PAGE])
    await old.decode(3 * PAGE)
    hop = it.hop("a", young)
    assert hop.is_parked
    old.session.close()
    it.readers.remove(old)
    frames = it.network.traffic[young.client.me, it["a"].peer].frames
    await asyncio.sleep(20)
    # Lists of sessions, and questions whether anybody is there, ever fewer of them.
    assert it.network.traffic[young.client.me, it["a"].peer].frames <= frames + 9
    assert hop.is_parked
    await young.decode(1)
    assert not hop.is_parked


@scene("a 0:4", cache_tokens=1 << 12, iteration_s=0.02, token_s=0.002)
async def test_a_replay_yields_to_fresh_rows(it):
    """Another session's tokens hardly wait while 600 rows are computed again."""
    long = await it.read(600)
    busy = await it.read(8, client=await it.swarm.open_client(), seed=1)
    started_s = now_s()
    await busy.decode(20)
    alone_s = (now_s() - started_s) / 20
    it["a"].server.evict_all()
    await busy.decode(1)
    replay = asyncio.ensure_future(long.decode(1))
    times = []
    while not replay.done():
        started_s = now_s()
        await busy.decode(1)
        times.append(now_s() - started_s)
    await replay
    assert len(times) > 10
    assert sorted(times)[len(times) // 2] < 3 * alone_s


SMALL = ServerConfig(engine=EngineLimits(budget_tokens=PAGE), quotas=Quotas(cache_share=1.0))


@scene("a 0:4", cache_tokens=8 * PAGE, config=SMALL)
async def test_a_chunk_that_fills_the_budget_and_finds_no_room_holds_up_nobody(it):
    """Found by the crossing sessions below: its turn came, and nothing ran any more."""
    (old,) = await in_turn(it, [3 * PAGE + 1])
    young = await it.read(client=old.client, seed=1)
    waiting = asyncio.ensure_future(young.prefill(6 * PAGE))
    await until(lambda: it.hop("a", young).settled_length == 4 * PAGE)
    async with asyncio.timeout(5.0):
        await old.decode(PAGE - 1)
    assert not waiting.done()
    old.session.close()
    it.readers.remove(old)
    await waiting


@scene("a 0:4", cache_tokens=8 * PAGE, config=SMALL)
async def test_a_chunk_without_room_does_not_hold_up_an_older_one_with_room(it):
    old, middle = await in_turn(it, [PAGE, 2 * PAGE])
    young = await it.read(client=old.client, seed=2)
    waiting = asyncio.ensure_future(young.prefill(6 * PAGE))
    await until(lambda: it.hop("a", young).settled_length == 5 * PAGE)
    middle.truncate(PAGE + 1)
    async with asyncio.timeout(5.0):
        await middle.prefill(PAGE - 1)
        await old.prefill(PAGE)
    old.session.close()
    it.readers.remove(old)
    await waiting


# --- everybody gets on ------------------------------------------------------------------


async def crowd(it, rng):
    """Sessions that together need about twice what fits; each grows bit by bit."""
    clients = [await it.swarm.open_client() for _ in range(2)]
    readers = []
    for seed in range(rng.randint(3, 6)):
        readers.append(await it.read(client=rng.choice(clients), seed=seed))
        await asyncio.sleep(0.002)

    async def work(reader):
        await reader.prefill(rng.randint(10, 80))
        for _ in range(rng.randint(1, 4)):
            await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 2))))
            await reader.decode(rng.randint(1, 12))
            if rng.random() < 0.3:
                await reader.verify(rng.randint(1, 5))
        reader.check()
        it.readers.remove(reader)
        reader.session.close()

    return readers, work


async def watch_the_oldest(tasks, readers):
    """The oldest session that is not done never stands still for long."""
    since_s, seen = now_s(), None
    while not all(task.done() for task in tasks):
        oldest = next(one for one, task in zip(readers, tasks, strict=True) if not task.done())
        state = (oldest.session.id, oldest.session.length, oldest.checked_rows)
        if state != seen:
            since_s, seen = now_s(), state
        assert now_s() - since_s < 30.0, "the oldest session stands still"
        await asyncio.sleep(0.5)


def tight(seed):
    """Two servers, each with room for one or two of the sessions."""

    async def story():
        rng = random.Random(seed)
        config = ServerConfig(
            quotas=Quotas(cache_share=rng.choice((0.75, 1.0)), log_bytes_max=ROW_BYTES * 200),
            window_bytes=rng.choice((1, 1000, 1 << 20)),
            engine=EngineLimits(
                log_bytes_per_session_max=rng.choice((ROW_BYTES * 16, 1 << 20)),
                budget_tokens=rng.choice((16, 512)),
            ),
        )
        it = Scene("a 0:2, b 2:4", config=config, seed=seed, patience_s=400.0)
        for server in it.servers.values():
            server.spec = replace(server.spec, cache_tokens=rng.choice((13, 16, 20)) * PAGE)
        async with it:
            readers, work = await crowd(it, rng)
            tasks = [asyncio.ensure_future(work(reader)) for reader in readers]
            async with asyncio.timeout(300.0):
                await watch_the_oldest(tasks, readers)
                await asyncio.gather(*tasks)

    run_virtual(story, timeout_s=2000.0)


@pytest.mark.parametrize("seed", range(12))
def test_crossing_sessions_on_two_tight_servers(seed):
    tight(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 300, 50))
def test_many_crossing_sessions_on_two_tight_servers(first):
    for seed in range(first, first + 50):
        tight(seed)


# --- while something is mended -------------------------------------------------------------


@scene("a 0:2, b 2:4, spare-b 2:4", cache_tokens=64 * PAGE)
async def test_eviction_while_a_replacement_is_replayed_to(it):
    reader = await it.read(320)
    await it["b"].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await until(lambda: (hop := it.hop("spare-b", reader)) and 0 < hop.settled_length < 200)
    hop = it.hop("spare-b", reader)
    for _ in range(3):
        await until(lambda: not hop.running and not hop.is_parked, step_s=0.0005)
        it["spare-b"].server.evict_all()
        assert hop.is_parked
    await step
    assert reader.chain == ["a", "spare-b"]


@scene("a 0:2, b 2:4, spare-b 2:4", cache_tokens=24 * PAGE, config=ALONE)
async def test_a_replacement_that_is_full_makes_room_by_age(it):
    """The older session is replayed to the spare though younger ones fill it."""
    old = (await in_turn(it, [12 * PAGE]))[0]
    await it["b"].crash()
    (young,) = await in_turn(it, [20 * PAGE])
    assert young.chain == ["a", "spare-b"]
    async with asyncio.timeout(60.0):
        await old.decode(3)
        assert parked(it, "spare-b", [old, young]) == [1]
        old.session.close()
        it.readers.remove(old)
        await young.decode(3)


@scene("a 0:2, b 2:4", cache_tokens=16 * PAGE, config=ALONE)
async def test_evicted_at_both_servers_in_one_moment(it):
    readers = await in_turn(it, [40, 40, 40])
    for name in "ab":
        it[name].server.evict_all()
    async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.decode(10))
