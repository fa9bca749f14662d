"""A server whose machine became slow says so while it serves, and when it has recovered."""

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest

from shoal.client.tending import TendConfig
from shoal.lab.network import LinkConditions
from shoal.lab.swarm import SWARM
from shoal.server.announcing import Announcement, Announcer
from shoal.server.refreshing import Refresher, RefreshTimes
from tests.simulation.scene import now_s, scene

TIMES = RefreshTimes(look_s=1.0, gap_s=8.0)
STAYS = TendConfig(is_moving=False)
TWINS = "a 0:2, b 2:4, spare-b 2:4"


@asynccontextmanager
async def refreshed(it, name):
    """The server keeps its own record true."""
    server = it[name]
    spec = server.spec
    said = Announcement(
        swarm=SWARM,
        boot_ms=2,
        addresses=(server._address,),
        facts=server.backend.facts,
        decode_s_per_block=(spec.iteration_s + spec.token_s) / len(spec.span),
    )
    announcer = Announcer(server.identity, it.swarm.directory, said)
    await announcer.announce("online")
    refresher = Refresher(announcer, lambda: server.server.engine.pace, lambda: None, TIMES)
    running = asyncio.ensure_future(refresher.run())
    try:
        yield refresher
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def said_s(it, name):
    found = it.swarm.directory.snapshot().find(it[name].peer)
    return found.record.decode_s_per_block


@scene(TWINS, link=LinkConditions(delay_s=0.01), tending=STAYS)
async def test_a_slow_server_is_known_to_be_slow_and_new_sessions_avoid_it(it):
    before_s = said_s(it, "b")
    async with refreshed(it, "b") as refresher:
        reader = await it.read(10)
        assert reader.chain == ["a", "b"]
        await reader.decode(200, pause_s=0.05)
        assert refresher.records == 0, "as fast as it said"
        it["b"].slowness = 20.0
        await reader.decode(200, pause_s=0.05)
        assert said_s(it, "b") == pytest.approx(16 * before_s, rel=0.1), "no more is believed"
        stranger = await it.read(10, client=await it.open_client())
        assert stranger.chain == ["a", "spare-b"]
        assert reader.chain == ["a", "b"]

        it["b"].slowness = 1.0
        await reader.decode(400, pause_s=0.05)
        assert said_s(it, "b") == pytest.approx(before_s, rel=0.1)
        assert refresher.records == 2


@scene(TWINS, tending=STAYS)
async def test_a_server_that_wavers_does_not_flood(it):
    async with refreshed(it, "b") as refresher:
        reader = await it.read(10)
        start_s = now_s()
        for turn in range(6):
            it["b"].slowness = 1.0 if turn % 2 else 4.0
            await reader.decode(70, pause_s=0.05)
        assert 1 <= refresher.records <= (now_s() - start_s) / TIMES.gap_s + 1
