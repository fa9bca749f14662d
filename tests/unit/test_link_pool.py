"""Dialling anew: how long, how often, and what the owner hears."""

import asyncio

import pytest

from shoal.base.errors import PeerTimeout, PeerUnreachable
from shoal.base.ids import PeerId
from shoal.lab.clock import run_virtual
from shoal.link.hearing import ADOPTED_SILENT_S, SILENT_S
from shoal.link.pool import DEAD_S, REDIAL_S, SenderPool
from tests.unit.test_link_sender import PEER, Events, Wire, outbound_with


class PoolEvents(Events):
    def __init__(self):
        super().__init__()
        self.broken = []

    def on_link_broken(self, peer, error, outbounds):
        now_s = asyncio.get_running_loop().time()
        self.broken.append((now_s, error, list(outbounds)))


class Dials:
    """Streams in order; None: a dial that never ends."""

    def __init__(self, *wires, took_s=0.0):
        self._wires, self._took_s = list(wires), took_s
        self.count = 0

    async def __call__(self, peer):
        assert peer == PEER
        self.count += 1
        await asyncio.sleep(self._took_s)
        wire = self._wires.pop(0) if self._wires else None
        if wire is None:
            await asyncio.sleep(1e6)
        return wire


@pytest.mark.parametrize(("took_s", "limit_s"), [(0.0, REDIAL_S), (0.75, 1.5)])
def test_a_silent_path_is_found_within_the_bound(took_s, limit_s):
    async def story():
        events, dials = PoolEvents(), Dials(Wire(is_silent=True), took_s=took_s)
        pool = SenderPool(dials, events)
        outbound = outbound_with(1, (1, b"x"))
        pool.attach(outbound, dial=True)
        await asyncio.sleep(10.0)
        ((at_s, error, outbounds),) = events.broken
        assert at_s == pytest.approx(took_s + SILENT_S + limit_s)
        assert isinstance(error, PeerTimeout)
        assert outbounds == [outbound]
        await pool.close()

    run_virtual(story)


def test_a_silent_stream_on_a_good_path_is_only_replaced():
    async def story():
        good, events = Wire(), PoolEvents()
        pool = SenderPool(Dials(Wire(is_silent=True), good), events)
        pool.attach(outbound_with(1, (1, b"x")), dial=True)
        await asyncio.sleep(SILENT_S + 0.1)
        assert len(good.entries) == 1
        assert events.broken == []
        await pool.close()

    run_virtual(story)


def test_a_receiver_that_dialled_may_be_busy_for_longer():
    """It misses its rows itself; what it left is closed in the end."""

    async def story():
        pool, wire = SenderPool(Dials(), PoolEvents()), Wire(is_silent=True)
        pool.attach(outbound_with(1, (1, b"x")), dial=False)
        serving = asyncio.ensure_future(pool.adopt(wire))
        await asyncio.sleep(ADOPTED_SILENT_S - 0.1)
        assert not serving.done()
        with pytest.raises(PeerTimeout):
            await serving
        assert asyncio.get_running_loop().time() == pytest.approx(ADOPTED_SILENT_S)
        await pool.close()

    run_virtual(story)


def test_a_route_that_comes_just_then_hears_at_once():
    """It was on its way when the last one's link was found dead."""

    async def story():
        events, dials = PoolEvents(), Dials(Wire(is_silent=True))
        pool = SenderPool(dials, events)
        outbound = outbound_with(1, (1, b"x"))
        pool.attach(outbound, dial=True)
        await asyncio.sleep(SILENT_S + REDIAL_S + DEAD_S / 2)
        outbound.reroute(PEER, 2)
        pool.attach(outbound, dial=True)
        await asyncio.sleep(0.01)
        assert [error.code for _, error, _ in events.broken] == ["timeout"] * 2
        assert dials.count == 2
        await asyncio.sleep(DEAD_S)
        pool.attach(outbound, dial=True)
        await asyncio.sleep(0.01)
        assert dials.count == 3
        await pool.close()

    run_virtual(story)


def test_a_refused_dial_is_tried_again_with_the_next_route():
    async def story():
        async def dial(peer):
            nonlocal count
            count += 1
            raise PeerUnreachable("nobody there")

        count, events = 0, PoolEvents()
        pool = SenderPool(dial, events)
        for _ in range(3):
            pool.attach(outbound_with(1, (1, b"x")), dial=True)
            await asyncio.sleep(0.01)
        assert count == len(events.broken) == 3
        assert all(isinstance(error, PeerUnreachable) for _, error, _ in events.broken)
        await pool.close()

    run_virtual(story)


def test_peers_are_dialled_apart():
    other = PeerId(b"o" * 32)

    async def story():
        dialled = []

        async def dial(peer):
            dialled.append(peer)
            return Wire()

        pool = SenderPool(dial, PoolEvents())
        for peer in (PEER, other):
            outbound = outbound_with(peer[0], (1, b"x"))
            outbound.reroute(peer, 1)
            pool.attach(outbound, dial=True)
        await asyncio.sleep(0.01)
        assert sorted(dialled) == sorted([PEER, other])
        await pool.close()

    run_virtual(story)
