"""Thin clients: a head server's death is a pause, and never another text."""

import asyncio
import random
from contextlib import aclosing

import pytest

from shoal.base.errors import BadInput, NoRouteError, PeerError, SessionClosed
from shoal.base.head import Choosing
from shoal.client import head_stream
from shoal.client.head_service import HeadLimits
from shoal.client.thin_session import Wish
from shoal.lab.toy_adapters import toy_adapter
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_HEAD, open_channel
from shoal.wire.head import AskTokens, CallShape, Options, StopTokens
from shoal.wire.messages import Error, Ping
from tests.simulation.scene import now_s, scene, until

PROMPT = tuple(range(1, 40))
SAMPLED = Choosing(temperature=0.8, seed=11, presence=0.5)
SERVERS = "a 0:2, b 2:4, spare-b 2:4, h 0:4, g 0:4"
HEADS = {"h": "toy", "g": "toy"}


def thin(servers=SERVERS, heads=HEADS, **more):
    return scene(servers, heads=heads, **more)


async def ask(session, count, choosing=SAMPLED, *, at=None, prompt=PROMPT, **more):
    """The ids of an answer; `at(n)` is called after the nth."""
    session.append(prompt)
    wish = Wish(count=count, choosing=choosing, answer_start=session.length, **more)
    ids = []
    async with aclosing(session.tokens(wish)) as tokens:
        async for chosen in tokens:
            ids.append(chosen.id)
            if at is not None:
                await at(len(ids))
    return ids


async def text(it, count=30, **more):
    client = await it.swarm.open_thin_client()
    async with await client.open_session() as session:
        return await ask(session, count, **more)


def head_of(it, session):
    return it.servers[it.name(session.head)]


@thin()
async def test_an_answer_is_the_one_of_any_head(it):
    first, second = await text(it), await text(it)
    assert first == second
    assert len(first) == 30
    assert await text(it, choosing=Choosing(temperature=0.8, seed=12)) != first


@pytest.mark.parametrize("how", ["crash", "silence", "hang"])
@pytest.mark.parametrize("when", [1, 17])
def test_a_head_that_dies_is_a_pause(how, when):
    @thin()
    async def story(it):
        whole = await text(it)
        client = await it.swarm.open_thin_client()
        session = await client.open_session()
        lost = []

        async def at(count):
            if count == when:
                server = head_of(it, session)
                lost.append(server.peer)
                if how == "crash":
                    await server.crash()
                elif how == "silence":
                    it.network.freeze(server.peer)
                else:
                    server.hang()

        assert await ask(session, 30, at=at) == whole
        if how != "hang":  # which is the chain's business
            (recovery,) = session.recoveries
            assert recovery.lost == tuple(lost)
            assert recovery.replacement == (session.head,)
            assert recovery.pause_s < 10
            assert session.numerics == "exact"
        session.close()

    story()


@thin()
async def test_a_chain_repaired_below_the_head_is_told(it):
    whole = await text(it, 40)
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    dead = []

    async def at(count):
        if count == 10:
            peers = [stage.peer for stage in session.chain if stage.peer != session.head]
            if peers:
                dead.append(peers[0])
                await it.servers[it.name(peers[0])].crash()

    assert await ask(session, 40, at=at) == whole
    for peer in dead:
        assert any(peer in one.lost for one in session.recoveries)
    session.close()


@thin()
async def test_turns_forks_and_cuts_survive_a_death(it):
    """A conversation with a turn more, a fork and a cut: with a death in between, and without."""

    async def talk(has_deaths):
        client = await it.swarm.open_thin_client()
        session = await client.open_session()
        found = [await ask(session, 10)]
        session.append(found[0][-1:])
        fork = await session.fork(30)
        found.append(await ask(session, 10, prompt=(7, 8, 9)))
        if has_deaths:
            await head_of(it, session).crash()
        found.append(await ask(fork, 10, prompt=(4,)))
        session.truncate(45)
        found.append(await ask(session, 10, prompt=(5, 6)))
        session.close()
        fork.close()
        return found

    whole = await talk(False)
    assert await talk(True) == whole
    assert len({tuple(one) for one in whole}) == 4


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_only_what_is_new_is_sent(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    await ask(session, 5)
    backend = it.servers["h"].backend
    await session.read()
    place = session._place
    assert place.held == session.length
    fork = await session.fork()
    assert fork._place.parent == place.number
    # The same row is there for both: no token is run again.
    assert await ask(fork, 3, prompt=()) == await ask(session, 3, prompt=())
    assert backend is not None
    fork.close()
    session.close()
    await until(lambda: it.servers["h"].heads.num_sessions == 0)


@thin()
async def test_who_stops_reading_stops_the_work(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()

    class Enough(Exception):
        pass

    async def at(count):
        if count == 3:
            raise Enough

    with pytest.raises(Enough):
        await ask(session, 10_000, at=at)
    heads = head_of(it, session).heads
    await until(lambda: heads.num_answers == 0, within_s=1.0)
    assert heads.num_sessions == 1
    before = heads.num_tokens
    await asyncio.sleep(1.0)
    assert heads.num_tokens == before
    assert len(await ask(session, 5, prompt=(1,))) == 5
    session.close()
    with pytest.raises(SessionClosed):
        await ask(session, 1)


def test_a_slow_reader_misses_nothing_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(head_stream, "GIVEN_MAX", 4)

    @thin("a 0:4, h 0:4", {"h": "toy"})
    async def story(it):
        client = await it.swarm.open_thin_client()
        slow, other = await client.open_session(), await client.open_session()
        whole = await ask(other, 30)
        place = other._place
        heads = it.servers["h"].heads

        async def at(count):
            if count == 3:
                await asyncio.sleep(3.0)
                assert heads.num_answers == 0  # the rest was stopped
                found.append(await ask(other, 5, prompt=(1,)))

        found = []
        assert await ask(slow, 30, at=at) == whole
        assert len(found[0]) == 5
        assert other._place is place
        assert slow.head == other.head
        assert slow.recoveries == other.recoveries == ()
        slow.close()
        other.close()
        await until(lambda: heads.num_sessions == 0)

    story()


@thin()
async def test_reading_alone_ends_a_pause_too(it):
    client = await it.swarm.open_thin_client(patience_s=20.0)
    session = await client.open_session()
    session.append(PROMPT)
    await session.read()
    dead = session.head
    await head_of(it, session).crash()
    await asyncio.sleep(0.1)
    session.append(PROMPT)
    await session.read()
    (recovery,) = session.recoveries
    assert (recovery.lost, recovery.replacement) == ((dead,), (session.head,))
    await asyncio.sleep(30.0)  # longer than the patience: that pause must be over
    await it.servers[it.name(dead)].start()
    await head_of(it, session).crash()
    assert len(await ask(session, 3)) == 3
    assert len(session.recoveries) == 2
    assert session.head == dead
    session.close()


@thin("a 0:2, b 2:4, late-h 0:4", {"late-h": "toy"})
async def test_without_a_head_it_waits_and_then_says_so(it):
    client = await it.swarm.open_thin_client(patience_s=5.0)
    with pytest.raises(NoRouteError, match="--with-head"):
        await client.open_session()
    opening = asyncio.ensure_future(client.open_session())
    await asyncio.sleep(1.0)
    await it.servers["late-h"].start()
    session = await opening
    assert len(await ask(session, 5)) == 5
    await it.servers["late-h"].crash()
    started_s = now_s()
    with pytest.raises(NoRouteError, match="no head server"):
        await ask(session, 5, prompt=(1,))
    assert 4 < now_s() - started_s < 20
    session.close()


@thin("a 0:4, h 0:4, g 0:4", {"h": "toy", "g": "other"})
async def test_another_class_of_head_is_said(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()

    async def at(count):
        if count == 5:
            await head_of(it, session).crash()

    await ask(session, 20, at=at)
    assert session.numerics == "crossed"
    session.close()


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_bad_questions_are_refused_one_by_one(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    for bad in ((-1,), (1000,), (2**32,)):
        with pytest.raises(BadInput):
            await ask(session, 1, prompt=bad)
    with pytest.raises(BadInput):
        await ask(session, 1, prompt=())
    with pytest.raises(BadInput):
        await ask(session, 1, Choosing(bias=((5000, 1.0),)))
    for score in (1e10, float("-inf"), float("nan")):
        with pytest.raises(BadInput, match="bias"):
            await ask(session, 1, Choosing(bias=((5, score),)))
    assert len(await ask(session, 5)) == 5
    session.close()


async def stranger(it, name="h"):
    """A head stream of somebody who writes frames by hand."""
    client = await it.swarm.open_thin_client()
    found = it.swarm.directory.snapshot().find(it.servers[name].peer)
    return await open_channel(
        client._transport, parse_address(found.record.addresses[0]), PURPOSE_HEAD,
        it.swarm.swarm_pass,
    )  # fmt: skip


BOTH = CallShape(2)


def question(call=1, session=1, start=0, num_ids=2, parts=(BOTH,), count=1, **more):
    return AskTokens(call, session, start, num_ids, list(parts), count, 0, Options(), [], **more)


IDS = bytes([1, 0, 0, 0, 2, 0, 0, 0])


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (question(), b""),
        (question(parts=[CallShape(1)]), IDS),
        (question(parts=[CallShape(1 << 20, 1 << 20)]), IDS),
        (question(count=2), IDS + b"\xff"),
        (question(), IDS + bytes((1 << 17) + 1)),
        (Ping(1), b""),
    ],
)
def test_nonsense_ends_the_stream(message, payload):
    @thin("a 0:4, h 0:4", {"h": "toy"})
    async def story(it):
        channel = await stranger(it)
        await channel.send(message, *([payload] if payload else []))
        answer = Ping(1)
        while not isinstance(answer, Error):
            answer, _ = await channel.receive()
        assert (answer.call, answer.code) == (0, "protocol")

    story()


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_a_stranger_takes_no_more_than_its_share(it):
    limits = HeadLimits(sessions_per_guest=2, answers_per_guest=2, tokens_per_guest=100)
    it.servers["h"].heads.limits = limits
    channel = await stranger(it)

    async def code(message):
        await channel.send(message, IDS)
        while True:
            answer, _ = await channel.receive()
            if isinstance(answer, Error) and answer.call == message.call:
                return answer.code
            if getattr(answer, "is_last", False) and answer.call == message.call:
                return "ok"

    assert await code(question(1, 1)) == "ok"
    assert await code(question(2, 2, count=99)) == "busy"
    assert await code(question(3, 2, start=5)) == "lost"
    assert await code(question(4, 2, count=2)) == "ok"
    assert await code(question(5, 3)) == "busy"
    it.servers["h"].heads.is_leaving = True
    assert await code(question(6, 1, start=2, num_ids=0, parts=())) == "busy"
    refused = await stranger(it)
    answer, _ = await refused.receive()
    assert (answer.code, answer.call) == ("busy", 0)
    channel.close()
    await until(lambda: it.servers["h"].heads.num_sessions == 0)


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_a_session_may_end_while_another_one_is_stopped(it):
    channel = await stranger(it)
    await channel.send(question(1, 1, count=1000), IDS)
    await channel.send(question(2, 2), IDS)
    heads = it.servers["h"].heads
    await until(lambda: heads.num_sessions == 2 and heads.num_answers == 1)
    (guest,) = heads._guests
    # As the sweep of idle sessions does, at the worst moment.
    guest.sessions[1].task.add_done_callback(lambda _: guest.sessions.pop(2).close())
    await channel.send(StopTokens(1))
    await until(lambda: heads.num_answers == 0, within_s=1.0)
    await channel.send(question(3, 1), IDS)
    answer = Ping(1)
    while getattr(answer, "call", 0) != 3:
        answer, _ = await channel.receive()
    assert answer.tokens
    channel.close()
    await until(lambda: heads.num_sessions == 0)


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_a_session_at_rest_too_long_is_sent_again(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    first = await ask(session, 5)
    heads = it.servers["h"].heads
    heads.limits = HeadLimits(idle_s=3.0)
    await asyncio.sleep(5.0)
    assert heads.num_sessions == 0
    second = await ask(session, 5, prompt=(3,))
    session.close()
    other = await client.open_session()
    assert await ask(other, 5) == first
    assert await ask(other, 5, prompt=(3,)) == second
    assert session.recoveries == ()
    other.close()


ADAPTED = toy_adapter(random.Random(7), 4)


def knows_adapter(it, head):
    """The head server's client brings the adapter wherever it is missing."""
    it.servers[head].heads.open_session.__self__.adapters.add(ADAPTED)
    return ADAPTED.manifest.name


@thin()
async def test_an_adapter_is_that_of_all_heads(it):
    for head in HEADS:
        name = knows_adapter(it, head)
    client = await it.swarm.open_thin_client()
    plain = await text(it)
    async with await client.open_session(name) as session:
        session.append(PROMPT)
        await session.read()
        child = await session.fork()
        await child.read()
        whole = await ask(session, 30, prompt=())
        assert await ask(child, 30, prompt=()) == whole
        child.close()
    assert whole != plain

    async def lose(count):
        if count == 5:
            await head_of(it, other).crash()

    async with await client.open_session(name) as other:
        assert await ask(other, 30, at=lose) == whole
        assert len(other.recoveries) == 1


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_a_session_keeps_its_adapter(it):
    name = knows_adapter(it, "h")
    channel = await stranger(it)
    codes = []
    for call, adapter in ((1, b""), (2, name)):
        start = 0 if call == 1 else 2
        await channel.send(question(call, 1, start, adapter=adapter), IDS)
        while True:
            answer, _ = await channel.receive()
            if getattr(answer, "call", None) == call:
                break
        codes.append(getattr(answer, "code", "given"))
    assert codes == ["given", "bad_input"]


@thin("a 0:4, h 0:4", {"h": "toy"})
async def test_a_head_that_leaves_an_adapter_out_is_left(it):
    """As an older one would, which does not know the word."""
    service = it.servers["h"].heads
    whole = service.open_session
    service.open_session = lambda encoding, **more: whole(encoding)
    client = await it.swarm.open_thin_client(patience_s=8.0)
    async with await client.open_session(ADAPTED.manifest.name) as session:
        with pytest.raises((BadInput, PeerError)):
            await ask(session, 3)
