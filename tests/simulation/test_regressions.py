"""What a review of the client found: sessions that hung, spun, or believed strangers."""

import asyncio

import pytest

from shoal.base.errors import NoRouteError, PeerBusy, PeerError
from shoal.net.channel import PURPOSE_ROWS_IN, PURPOSE_ROWS_OUT
from shoal.wire.messages import Broken, Failed
from tests.simulation.scene import Scene, now_s, run_virtual, scene, until

PATIENCE_S = 20.0
SPARE = "a 0:2, b 2:4, spare-b 2:4"


def turn_away(server, purpose, error=None):
    """Let the server end each stream of this purpose at once, with a reason or without.

    Returns a list that grows by the time of each such stream.
    """
    times = []

    async def turn(channel):
        times.append(now_s())
        if error is None:
            channel.close()
        else:
            await channel.refuse(error)

    server._services = {**server._services, purpose: turn}
    return times


async def fails_in_time(it, doing):
    """The session must end with an error of ours, not hang."""
    started_s = now_s()
    with pytest.raises((NoRouteError, PeerError)):
        await doing
    assert now_s() - started_s <= 2 * PATIENCE_S + 5.0
    await until(lambda: not it.client.num_sessions)


# --- hopeless repairs --------------------------------------------------------------


def test_the_only_server_fails_at_a_position_every_time():
    """Each repair works, and the replay fails again: after the patience it is over."""

    async def story():
        async with Scene("a 0:2, b 2:4", patience_s=PATIENCE_S) as it:
            reader = await it.read(10)
            it["b"].fault = lambda call: "raise" if call.position >= 10 else None
            await fails_in_time(it, reader.decode(1))
            assert reader.session.epoch < 100
            it.readers.clear()

    run_virtual(story, timeout_s=1000.0)


def test_the_only_first_server_takes_no_rows():
    """It answers pings and follows routes, but ends each stream of rows to it."""

    async def story():
        async with Scene("a 0:2, b 2:4", patience_s=PATIENCE_S) as it:
            times = turn_away(it["a"].server, PURPOSE_ROWS_OUT)
            reader = await it.read()
            await fails_in_time(it, reader.decode(1))
            assert len(times) < 100
            assert reader.session.epoch < 100
            it.readers.clear()

    run_virtual(story, timeout_s=1000.0)


# --- streams of rows that the last server ends --------------------------------------


@pytest.mark.parametrize("error", [None, PeerBusy("go away", retry_after_s=1.0)])
def test_the_last_server_sends_no_rows_and_is_replaced(error):
    @scene(SPARE)
    async def story(it):
        times = turn_away(it["b"].server, PURPOSE_ROWS_IN, error)
        reader = await it.read()
        async with asyncio.timeout(30.0):
            await reader.decode(3)
        assert reader.chain == ["a", "spare-b"]
        assert len(times) < 10

    story()


@scene("a 0:2, b 2:4")
async def test_an_idle_session_does_not_dial_in_vain_without_a_pause(it):
    times = turn_away(it["b"].server, PURPOSE_ROWS_IN)
    reader = await it.read()
    await asyncio.sleep(60.0)
    assert len(times) < 100
    assert reader.session.epoch < 100
    it.readers.clear()
    reader.session.close()


@scene("a 0:2, b 2:4")
async def test_the_last_server_ends_the_stream_once_with_a_reason(it):
    """The stream is dialled again: the next row comes without a repair."""
    reader = await it.read(4)
    (sender,) = it["b"].server._senders._senders.values()
    await sender._channel.refuse(PeerBusy("go away", retry_after_s=1.0))
    await asyncio.sleep(1.0)
    async with asyncio.timeout(30.0):
        await reader.decode(3)
    assert reader.chain == ["a", "b"]


# --- servers that look alive ----------------------------------------------------------


@scene(SPARE)
async def test_a_server_that_answers_but_computes_nothing_is_replaced(it):
    """Its engine never begins an iteration, so none is ever too slow."""
    reader = await it.read(4)
    release = asyncio.Event()
    stopped = asyncio.ensure_future(hold(it["b"].server.engine, release))
    async with asyncio.timeout(60.0):
        await reader.decode(1)
    assert reader.chain == ["a", "spare-b"]
    release.set()
    await stopped


async def hold(engine, release):
    async with engine.exclusive():
        await release.wait()


@pytest.mark.parametrize("iteration_s", [2.5, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0])
def test_a_slow_first_iteration_is_not_called_stuck(iteration_s):
    """A server without experience can't say how long it will take."""

    @scene("a 0:2, b 2:4, spare-a 0:2, spare-b 2:4", iteration_s=iteration_s)
    async def story(it):
        reader = await it.read(4)
        await reader.decode(2)
        assert reader.chain == ["a", "b"]
        assert reader.repairs == []
        assert it.client.experience.snapshot(now_s()).avoid == frozenset()

    story()


# --- lies --------------------------------------------------------------------------------


def failed(reader, code, *, start=2, blame=b""):
    session = reader.session
    return Failed(session.id, start, session.epoch, code, "a lie", None, blame)


def broken(reader, peer):
    return Broken(reader.session.id, 2, reader.session.epoch, peer, "unreachable", "a lie")


@pytest.mark.parametrize("code", ["bad_input", "too_long", "lost", "misbehaved", "internal"])
def test_a_server_outside_the_chain_has_no_say(code):
    @scene(SPARE)
    async def story(it):
        reader = await it.read(4)
        stranger, epoch = it["spare-b"].peer, reader.session.epoch
        it.client.on_failed(stranger, failed(reader, code))
        it.client.on_failed(stranger, failed(reader, code, blame=it["b"].peer))
        it.client.on_broken(stranger, broken(reader, it["b"].peer))
        await asyncio.sleep(1.0)
        await reader.decode(3)
        assert reader.session.epoch == epoch
        assert reader.chain == ["a", "b"]

    story()


@scene("a 0:2, b 2:4, c 4:6, spare-a 0:2, spare-b 2:4, spare-c 4:6")
async def test_a_server_can_only_blame_the_one_before_it(it):
    """Whom `c` blames wrongly stays; who blames wrongly goes."""
    reader = await it.read(4)
    it.client.on_failed(it["c"].peer, failed(reader, "misbehaved", start=4, blame=it["a"].peer))
    await reader.decode(1)
    assert reader.chain == ["a", "b", "spare-c"]
    before = failed(reader, "misbehaved", start=4, blame=it["b"].peer)
    it.client.on_failed(it["spare-c"].peer, before)
    await reader.decode(1)
    assert reader.chain == ["a", "spare-b", "spare-c"]


@scene(SPARE)
async def test_a_server_cannot_blame_the_client(it):
    reader = await it.read(4)
    message = failed(reader, "misbehaved", start=0, blame=it.client.me)
    it.client.on_failed(it["a"].peer, message)
    async with asyncio.timeout(60.0):
        await reader.decode(1)
    assert it.client.me not in it.client.experience.snapshot(now_s()).avoid


@scene("a 0:2, b 2:4, c 4:6, spare-c 4:6")
async def test_a_broken_link_that_the_chain_does_not_have_is_ignored(it):
    reader = await it.read(4)
    epoch = reader.session.epoch
    for sender, receiver in ("ac", "ba", "bb"):
        it.client.on_broken(it[sender].peer, broken(reader, it[receiver].peer))
    await asyncio.sleep(1.0)
    await reader.decode(1)
    assert reader.session.epoch == epoch
    assert it.client.experience.snapshot(now_s()).unreachable_pairs == frozenset()
