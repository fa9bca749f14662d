"""One client floods the servers; another one just reads an answer."""

import asyncio
from contextlib import suppress
from statistics import mean

import pytest

from shoal.base.errors import PeerBusy, ShoalError
from shoal.lab.toy_blocks import toy_embedding
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.quotas import Quotas
from tests.simulation.scene import Scene, now_s, run_virtual, scene

ITERATION_S = 0.1
TOKEN_S = 0.002
"""As measured on one core: 16 rows take 1.3 times as long as one, a chunk of 128 four times."""


def rows(count):
    return b"".join(map(toy_embedding, range(count)))


async def answer_s(reader, count=40):
    """The mean time per token."""
    times = []
    for _ in range(count):
        started_s = now_s()
        await reader.decode(1)
        times.append(now_s() - started_s)
    return mean(times)


async def chatter(session):
    await session.step(rows(16), 16)
    while True:
        await session.step(rows(1), 1)


async def stuff(session):
    while session.length < 4096:
        await session.step(rows(512), 512, chunk_tokens=128)
    session.truncate(0)


async def flood(it, chats, prompts):
    """Sessions of a client of their own: answers, and prompts one after the other."""
    greedy = await it.swarm.open_client()
    sessions = [await greedy.open_session("float32") for _ in range(chats + prompts)]
    work = [
        *(asyncio.ensure_future(chatter(session)) for session in sessions[:chats]),
        *(asyncio.ensure_future(stuff(session)) for session in sessions[chats:]),
    ]
    return sessions, work


async def ended(sessions, work):
    for task in work:
        task.cancel()
    for task in work:
        with suppress(asyncio.CancelledError, ShoalError):
            await task
    for session in sessions:
        session.close()


@pytest.mark.parametrize(
    ("chats", "prompts"), [(40, 0), (0, 10), (30, 5)], ids=["chats", "prompts", "both"]
)
def test_ten_times_the_load_from_one_client_at_most_doubles_the_time_of_another(chats, prompts):
    async def story():
        async with Scene(
            "a 0:2, b 2:4", iteration_s=ITERATION_S, token_s=TOKEN_S, cache_tokens=1 << 18
        ) as it:
            reader = await it.read(8)
            alone_s = await answer_s(reader)
            sessions, work = await flood(it, chats, prompts)
            await asyncio.sleep(5)
            flooded_s = await answer_s(reader)
            lengths = [session.length for session in sessions]
            await ended(sessions, work)
            assert flooded_s <= 2 * alone_s, f"{flooded_s / alone_s:.2f} times as long"
            assert min(lengths) > 16, "the flood itself stands still"

    run_virtual(story, timeout_s=5000.0)


def test_a_client_that_is_alone_is_not_slowed_down():
    """Many rows share an iteration, and chunks follow each other without a pause."""

    async def story():
        async with Scene("a 0:4", iteration_s=ITERATION_S, token_s=TOKEN_S) as it:
            sessions, work = await flood(it, 64, 0)
            await asyncio.sleep(10)
            runs, decoded = it["a"].backend.runs, sum(one.length for one in sessions)
            await asyncio.sleep(10)
            gained = sum(one.length for one in sessions) - decoded
            assert gained / (it["a"].backend.runs - runs) > 25
            await ended(sessions, work)
            (prompt,), work = await flood(it, 0, 1)
            started_s = now_s()
            await prompt.step(rows(2048), 2048, chunk_tokens=128)
            chunk_s = ITERATION_S + 128 * TOKEN_S
            assert now_s() - started_s < 1.2 * 2 * 16 * chunk_s
            await ended([prompt], work)

    run_virtual(story, timeout_s=5000.0)


def test_lying_about_its_age_gives_a_client_no_more_than_its_share():
    """It says that all its sessions are older than anybody's; others still get the rest."""

    async def story():
        config = ServerConfig(quotas=Quotas(cache_share=0.5))
        async with Scene("a 0:4", cache_tokens=16 * 16, config=config) as it:
            liar = await it.swarm.open_client()
            liar._wall_clock = lambda: 0.0
            sessions = [await liar.open_session("float32") for _ in range(4)]
            work = [
                asyncio.ensure_future(session.step(rows(60), 60, chunk_tokens=10))
                for session in sessions
            ]
            await asyncio.sleep(1)
            reader = await it.read(100)
            await reader.decode(10)
            await ended(sessions, work)

    run_virtual(story, timeout_s=5000.0)


def test_two_clients_that_fill_the_cache_both_finish():
    """Nobody waits for a younger session: the older one goes on, the other returns later."""

    async def story():
        async with Scene("a 0:4", cache_tokens=16 * 16) as it:
            other = await it.swarm.open_client()
            old, young = await it.read(13 * 16), await it.read(3 * 16, client=other)
            async with asyncio.TaskGroup() as group:
                group.create_task(old.decode(20))
                group.create_task(young.decode(20))
            old.session.close()
            await young.decode(20)
            it.readers.remove(old)

    run_virtual(story, timeout_s=5000.0)


def test_a_prompt_gets_on_where_decode_rows_fill_every_iteration():
    """One client decodes a hundred sessions, with a budget of 64; another has a prompt."""

    async def story():
        config = ServerConfig(engine=EngineLimits(budget_tokens=64))
        async with Scene(
            "a 0:4", iteration_s=0.1, token_s=0.002, cache_tokens=1 << 18, config=config
        ) as it:
            sessions, work = await flood(it, 100, 0)
            await asyncio.sleep(10)
            reader = await it.read()
            started_s = now_s()
            await reader.prefill(128)
            assert now_s() - started_s < 60
            await ended(sessions, work)

    run_virtual(story, timeout_s=5000.0)


def test_prompts_finish_beside_chats_that_end():
    """Whoever closed its session holds up nobody's prompt."""

    async def story():
        async with Scene("a 0:4", iteration_s=0.1, token_s=0.002, cache_tokens=1 << 16) as it:
            reader = await it.read()
            task = asyncio.ensure_future(reader.prefill(1024))
            started_s = now_s()
            while not task.done():
                chat = await it.swarm.clients[0].open_session("float32")
                await chat.step(rows(1), 1)
                chat.close()
            await task
            assert now_s() - started_s < 60

    run_virtual(story, timeout_s=5000.0)


CROWD = ServerConfig(quotas=Quotas(queue_bytes_per_client=64 * 40))


@scene("a 0:4", config=CROWD)
async def test_rows_beyond_the_quota_are_dropped_and_asked_for_again(it):
    readers = [await it.read(seed=seed, chunk_tokens=8) for seed in range(8)]
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.prefill(64))


@scene("a 0:4", config=ServerConfig(quotas=Quotas(queue_bytes_per_client=1)))
async def test_a_quota_below_one_entry_lets_one_entry_wait(it):
    readers = [await it.read(seed=seed) for seed in range(3)]
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.prefill(64))


@scene("a 0:4", config=CROWD)
async def test_dropped_rows_come_again_when_the_session_that_crowded_them_out_ends(it):
    other = await it.swarm.open_client()
    busy = await it.read(4, client=other)
    greedy = await it.client.open_session("float32")
    reader = await it.read(4, seed=2)
    it["a"].slowness = 200.0
    first = asyncio.ensure_future(busy.decode(1))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(greedy.step(rows(40), 40, chunk_tokens=8))
    await asyncio.sleep(0.05)
    third = asyncio.ensure_future(reader.decode(1))
    await asyncio.sleep(0.05)
    assert it.hop("a", reader).is_overrun
    greedy.close()
    it["a"].slowness = 1.0
    await asyncio.gather(first, third)
    with suppress(ShoalError):
        await second


@scene("a 0:4", config=CROWD)
async def test_a_crowded_session_that_is_parked_comes_back(it):
    other = await it.swarm.open_client()
    busy = await it.read(4, client=other)
    reader = await it.read(4, seed=2)
    it["a"].slowness = 200.0
    first = asyncio.ensure_future(busy.decode(1))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(reader.prefill(200))
    await asyncio.sleep(0.1)
    hop = it.hop("a", reader)
    assert hop.is_overrun
    it["a"].server.sessions.park(hop)
    it["a"].server.on_held_changed(hop)
    it["a"].slowness = 1.0
    await asyncio.gather(first, second)


@scene("a 0:2, b 2:4", config=ServerConfig(quotas=Quotas(bytes_per_s_per_client=64 * 50)))
async def test_rows_of_a_client_run_no_faster_than_the_quota(it):
    """And another client, whose rows come over the same streams, is not held up."""
    reader = await it.read(20)
    bystander = await it.read(4, client=await it.swarm.open_client())
    started_s = now_s()
    task = asyncio.ensure_future(reader.prefill(200))
    await bystander.decode(5)
    assert now_s() - started_s < 1
    await task
    assert now_s() - started_s > 2
    assert reader.repairs == bystander.repairs == []


@scene("a 0:4", config=ServerConfig(quotas=Quotas(log_bytes_max=64 * 64)))
async def test_logs_beyond_the_budget_are_shortened_and_repair_still_works(it):
    readers = [await it.read(40, seed=seed) for seed in range(4)]
    for reader in readers:
        await reader.decode(30)
    hops = it.hops("a")
    assert sum(hop.log.num_bytes for hop in hops) <= 2 * 64 * 64
    assert any(hop.log.start for hop in hops)
    await it["a"].crash()
    await it["a"].start()
    for reader in readers:
        await reader.decode(3)


@scene("a 0:4", config=ServerConfig(quotas=Quotas(streams_per_peer=3)))
async def test_a_peer_with_enough_streams_is_told_so(it):
    reader = await it.read(5)
    server = it["a"].server
    with (
        pytest.raises(PeerBusy, match="3 streams"),
        server._intake.stream(it.client.me),
        server._intake.stream(it.client.me),
    ):
        raise AssertionError("control, rows out and these are too many")
    await reader.decode(2)
