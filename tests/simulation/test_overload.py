"""One client floods the servers; another one just reads an answer."""

import asyncio
from contextlib import suppress
from statistics import mean

import pytest

from shoal.base.errors import PeerBusy, ShoalError
from shoal.lab.toy_blocks import toy_embedding
from shoal.server.config import ServerConfig
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
    """It says that all its sessions are older than anybody's; others still get their half."""

    async def story():
        async with Scene("a 0:4", cache_tokens=16 * 16) as it:
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


@scene("a 0:4", config=ServerConfig(quotas=Quotas(queue_bytes_per_client=1 << 12)))
async def test_rows_beyond_the_quota_are_dropped_and_asked_for_again(it):
    readers = [await it.read(seed=seed, chunk_tokens=8) for seed in range(8)]
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.prefill(64))


@scene("a 0:2, b 2:4", config=ServerConfig(quotas=Quotas(bytes_per_s_per_peer=64 * 50)))
async def test_rows_come_in_no_faster_than_the_quota(it):
    reader = await it.read(20)
    started_s = now_s()
    await reader.prefill(100)
    await reader.decode(5)
    assert now_s() - started_s > 1.5


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
