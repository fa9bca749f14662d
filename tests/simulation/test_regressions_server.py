"""What a review of the server found: endless resends, stale routes, leaks, a broken engine."""

import asyncio

import pytest

from shoal.base.errors import InternalError, PeerUnreachable
from shoal.base.ids import session_id
from shoal.base.spans import Span
from shoal.lab.toy_backend import MODEL
from shoal.net.identity import ROUTE, Identity
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.wire.messages import Hop, Route, RouteBody, encode
from tests.simulation.scene import now_s, scene

ROW_BYTES = 64
NARROW = ServerConfig(window_bytes=64 * ROW_BYTES, engine=EngineLimits(budget_tokens=16))


# --- flow control ------------------------------------------------------------------------


@scene("a 0:4", config=NARROW, iteration_s=15.0, timeout_s=10_000.0)
async def test_a_long_prompt_is_not_sent_again_while_a_slow_server_works(it):
    """The client asks what the server has again and again; that opens no new window."""
    reader = await it.read(16)
    sent = it.network.traffic[it.client.me, it["a"].peer]
    before, rows = sent.frame_bytes, 640
    longest = 0
    pings = 640 / 16 * 15.0 * 2 * 60  # twice a second
    step = asyncio.ensure_future(reader.prefill(rows))
    while not step.done():
        await asyncio.sleep(1.0)
        hop = it.hop("a", reader)
        longest = max(longest, hop.queue_bytes)
    await step
    assert longest <= NARROW.window_bytes
    assert sent.frame_bytes - before < 1.5 * rows * ROW_BYTES + pings


# --- routes ---------------------------------------------------------------------------------


class Owner:
    """Somebody with a session, who sends routes."""

    def __init__(self, it):
        self.identity = Identity.from_seed(bytes(range(32)))
        self.nonce = b"n" * 16
        self.session = session_id(self.identity.peer, self.nonce)
        self._it = it

    async def route(self, epoch, *hops):
        """`hops` are like "a 0:2"; only server `a` is told."""
        stages = []
        for text in hops:
            name, span = text.split()
            start, end = map(int, span.split(":"))
            stages.append(Hop(self._it[name].peer, start, end, "float32"))
        body = encode(RouteBody(self.identity.peer, self.nonce, epoch, MODEL, 1, stages))
        route = Route(1, body, self.identity.sign(ROUTE, body))
        return await self._it["a"].server.route(self.identity.peer, route)

    @property
    def hops(self):
        """(span, epoch) of each hop of the session at `a`."""
        return [(hop.plan.span, hop.plan.epoch) for hop in self._it.hops("a")]

    def close(self):
        self._it["a"].server.close_session(self.identity.peer, self.session)


@scene("a 0:4, b 0:4")
async def test_a_route_of_a_lower_epoch_changes_nothing(it):
    owner = Owner(it)
    await owner.route(5, "a 0:2", "b 2:4")
    (hop,) = it.hops("a")
    answer = await owner.route(3, "a 0:4")
    assert answer.epoch == 5
    assert it.hops("a") == [hop]
    assert owner.hops == [(Span(0, 2), 5)]
    answer = await owner.route(4, "b 0:1", "a 1:4")
    assert hop in it.hops("a")
    assert (Span(0, 2), 5) in owner.hops
    owner.close()


@scene("a 0:4, b 0:4")
async def test_a_hop_that_a_newer_route_leaves_out_is_forgotten(it):
    owner = Owner(it)
    await owner.route(1, "b 0:2", "a 2:4")
    await owner.route(2, "b 0:1", "a 1:4")
    assert owner.hops == [(Span(1, 4), 2)]
    await owner.route(3, "b 0:2", "a 2:4")
    assert owner.hops == [(Span(2, 4), 3)]
    (hop,) = it.hops("a")
    assert it["a"].server.sessions.sending(owner.session, 4) is hop
    owner.close()


@scene("a 0:4, b 0:4")
async def test_two_hops_of_one_session_at_one_server(it):
    """Each is found by its own links; one may go and the other stay."""
    owner = Owner(it)
    await owner.route(1, "a 0:1", "b 1:3", "a 3:4")
    first, last = it.hops("a")
    assert it["a"].server.sessions.sending(owner.session, 1) is first
    assert it["a"].server.sessions.sending(owner.session, 4) is last
    await owner.route(2, "b 0:3", "a 3:4")
    assert it.hops("a") == [last]
    owner.close()


@scene("a 0:4, b 0:4")
async def test_other_work_at_the_same_block_begins_anew(it):
    owner = Owner(it)
    await owner.route(1, "a 0:2", "b 2:4")
    (old,) = it.hops("a")
    await owner.route(2, "a 0:3", "b 3:4")
    (new,) = it.hops("a")
    assert new is not old
    assert owner.hops == [(Span(0, 3), 2)]
    assert it["a"].server.sessions.sending(owner.session, 2) is None
    owner.close()


# --- leaks --------------------------------------------------------------------------------


@scene("a 0:2, b 2:4")
async def test_clients_that_come_and_go_leave_nothing_behind(it):
    for seed in range(10):
        client = await it.swarm.open_client()
        reader = await it.read(4, client=client, seed=seed)
        await reader.decode(1)
        reader.check()
        it.readers.remove(reader)
        reader.session.append(bytes(8 * ROW_BYTES), 8)
        await asyncio.sleep(0.0201)
        reader.session.close()
        await client.stop()
    await asyncio.sleep(60.0)
    for name in "ab":
        server = it[name].server
        assert len(server._senders._senders) <= 1
        assert server.sessions.ledger.free == server.sessions.ledger.total
        assert not server.engine._since


# --- a broken engine -----------------------------------------------------------------------


@scene("a 0:2, b 2:4, spare-b 2:4")
async def test_a_server_with_a_broken_engine_does_not_look_alive(it):
    """A backend that refuses to free a cache is a bug that no call is to blame for."""
    reader = await it.read(4)
    server = it["b"].server
    waiting = asyncio.ensure_future(server.wait_broken())
    await it["b"].backend.aclose()
    await reader.decode(3)
    assert reader.chain == ["a", "spare-b"]
    with pytest.raises(InternalError, match="the engine broke"):
        await waiting
    assert it["b"].peer in it.client.experience.snapshot(now_s()).avoid
    assert not it.client.link(it["b"].peer).is_up
    with pytest.raises(PeerUnreachable):
        await it.client.link(it["b"].peer).connect(rows=False)
    await it["b"].crash()
