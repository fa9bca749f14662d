"""Clients that vanish in every way there is: servers soon keep nothing of theirs."""

import asyncio
from contextlib import suppress

import pytest

from shoal.base.errors import ShoalError
from shoal.base.limits import KEEP_PERIOD_S, ORPHAN_GRACE_S
from shoal.lab.toy_blocks import toy_embedding
from shoal.net.channel import PURPOSE_CONTROL
from shoal.server.control import SILENCE_MAX_S
from tests.simulation.scene import scene, until

SERVERS = "a 0:2, b 2:4, c 4:6"
SLACK_S = 1.5
"""Round trips, an engine iteration, and how finely we look."""


def held(it, client):
    """All that servers keep of a client: sessions, places in line, streams."""
    found = {}
    for name, server in it.servers.items():
        if server.server is None:
            continue
        table = server.server.sessions
        streams = [
            one for one in it.swarm.memory.transport(server.peer)._streams if one.peer == client.me
        ]
        lines = [one for one in table.line._places.values() if one.owner == client.me]
        intake = server.server._intake
        counts = (
            len(table.of_owner(client.me)),
            len(streams),
            len(lines),
            intake._streams[client.me],
            intake._queued[client.me],
        )
        if any(counts):
            found[name] = counts
    return found


async def crowd(it):
    """A client with sessions at rest, in a prefill and in an answer; all are under way."""
    doomed = await it.swarm.open_client()
    sessions = [await doomed.open_session("float32") for _ in range(4)]

    async def work(session, count, again):
        with suppress(ShoalError):
            while True:
                rows = b"".join(map(toy_embedding, range(count)))
                await session.step(rows, count, chunk_tokens=16)
                if not again:
                    return

    works = [
        asyncio.ensure_future(work(*arguments))
        for arguments in zip(sessions, (5, 400, 1, 1), (False, False, True, True), strict=True)
    ]
    await until(lambda: sessions[2].length > 20)
    it.gone.append(doomed)
    return doomed, works


async def is_freed(it, doomed, within_s):
    """Nothing is left in time, and the pages of it are free."""
    freed_s = await until(lambda: not held(it, doomed), within_s=within_s + SLACK_S)
    for name in "abc":
        sessions = it[name].server.sessions
        ledger = sessions.ledger
        mine = sum(ledger.held(hop.sequence) for hop in sessions)
        assert ledger.total - ledger.free == mine
    return freed_s


def stop_all(works):
    for work in works:
        work.cancel()


async def kill(it, doomed):
    it.swarm.memory.crash(doomed.me, detect_after_s=0.0)


async def lose_power(it, doomed):
    it.swarm.memory.crash(doomed.me, detect_after_s=None)


async def swallow(it, doomed):
    """Nothing of it arrives any more, and no stream breaks."""
    for server in it.servers.values():
        it.network.black_hole(doomed.me, server.peer)


async def freeze(it, doomed):
    it.network.freeze(doomed.me)


@pytest.mark.parametrize(
    ("vanish", "within_s"),
    [
        (kill, ORPHAN_GRACE_S),
        (lose_power, SILENCE_MAX_S + ORPHAN_GRACE_S),
        (swallow, SILENCE_MAX_S + ORPHAN_GRACE_S),
        (freeze, SILENCE_MAX_S + ORPHAN_GRACE_S),
    ],
)
def test_all_of_a_vanished_client_is_freed(vanish, within_s):
    """In time, whatever it was at; another client's answer goes on without a repair."""

    @scene(SERVERS)
    async def story(it):
        reader = await it.read(30)
        doomed, works = await crowd(it)
        assert set(held(it, doomed)) == {"a", "b", "c"}
        await vanish(it, doomed)
        decoding = asyncio.ensure_future(reader.decode(int(within_s * 4), pause_s=0.25))
        await is_freed(it, doomed, within_s)
        await decoding
        stop_all(works)
        await doomed.stop()  # where it lives, it tries to come back all the time
        assert reader.session.epoch == 1

    story()


@scene(SERVERS)
async def test_a_client_that_says_good_bye(it):
    """Closed sessions are gone at once; its streams end with it."""
    doomed, works = await crowd(it)
    stop_all(works)
    await doomed.stop()
    await is_freed(it, doomed, ORPHAN_GRACE_S)


@scene(SERVERS)
async def test_a_client_that_forgets_its_sessions(it):
    """Its control stream stands, and its next list does not name them."""
    doomed, works = await crowd(it)
    stop_all(works)
    doomed._sessions.clear()
    freed_s = await until(
        lambda: all(not it[name].server.sessions.of_owner(doomed.me) for name in "abc"),
        within_s=KEEP_PERIOD_S + SLACK_S,
    )
    assert freed_s > 0
    assert set(held(it, doomed)) == {"a", "b", "c"}, "its streams are open all the while"


@scene(SERVERS)
async def test_a_client_that_comes_back_in_time_keeps_all(it):
    """A control stream that breaks is dialled again: nothing is computed twice."""
    reader = await it.read(30)
    before = {name: it.hop(name, reader).sequence for name in "abc"}
    for _ in range(3):
        for name in "abc":
            it[name].server._controls.close(it.client.me)
        await reader.decode(1)
        await asyncio.sleep(ORPHAN_GRACE_S * 0.7)
    await asyncio.sleep(2 * ORPHAN_GRACE_S)
    await reader.decode(1)
    assert {name: it.hop(name, reader).sequence for name in "abc"} == before


@scene("a 0:2", cache_tokens=64)
async def test_a_place_in_line_is_lost_with_its_owner(it):
    """Who is behind a client that was killed moves up before the place lapses."""
    reader = await it.read(60)
    doomed = await it.swarm.open_client()
    waiting = asyncio.ensure_future(doomed.open_session("float32"))
    line = it["a"].server.sessions.line
    await until(lambda: len(line) == 1)
    it.gone.append(doomed)
    it.swarm.memory.crash(doomed.me, detect_after_s=0.0)
    waiting.cancel()
    await until(lambda: not held(it, doomed), within_s=ORPHAN_GRACE_S + SLACK_S)
    await reader.decode(1)


@scene("a 0:2")
async def test_streams_of_a_client_without_sessions_end_too(it):
    """It lost power between two answers."""
    doomed = await it.swarm.open_client()
    session = await doomed.open_session("float32")
    await session.step(toy_embedding(1), 1)
    session.close()
    await until(lambda: not it.hops("a"))
    it.gone.append(doomed)
    it.swarm.memory.crash(doomed.me, detect_after_s=None)
    await until(lambda: not held(it, doomed), within_s=SILENCE_MAX_S + ORPHAN_GRACE_S + SLACK_S)


@scene("a 0:2, b 2:4")
async def test_a_second_control_stream_that_ends_is_no_departure(it):
    """A gateway's dashboard looks at loads under the same identity as its answers."""
    reader = await it.read(20)
    for _ in range(2):
        for name in "ab":
            look = await it.client.dial(it[name].peer, PURPOSE_CONTROL)
            look.close()
        await asyncio.sleep(15)
        await reader.decode(3)
    assert reader.repairs == []
