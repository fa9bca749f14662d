"""Blocks that nobody has for a while: the session waits, says for what, and goes on."""

import asyncio

import pytest

from shoal.base.errors import NoRouteError, PeerUnreachable
from shoal.base.ids import short
from shoal.base.spans import Span
from tests.simulation.scene import now_s, scene, until

PATIENCE_S = 120.0


def listen(client):
    """What the client's user is told, with the time."""
    told = []
    client.on_waiting = lambda session, waiting: told.append((now_s(), session, waiting))
    return told


def missing(told):
    return {waiting.missing for _, _, waiting in told if waiting is not None}


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_an_answer_waits_for_whoever_joins(lost):
    """The text goes on where it stood; only the newcomer computes the past again."""

    @scene("a 0:2, b 2:4, c 4:6, late-a 0:2, late-b 2:4, late-c 4:6", patience_s=PATIENCE_S)
    async def story(it):
        reader = await it.read(40)
        told = listen(it.client)
        await it[lost].crash()
        decoding = asyncio.ensure_future(reader.decode(3))
        await asyncio.sleep(PATIENCE_S / 2)
        assert told[-1][2] is not None
        assert missing(told) == {(it[lost].spec.span,)}
        assert {stage.peer for stage in told[-1][2].lost} == {it[lost].peer}
        assert told[-1][2].deadline_s == pytest.approx(told[0][2].since_s + PATIENCE_S)
        await it[f"late-{lost}"].start()
        await decoding
        assert told[-1][1:] == (reader.session.id, None)
        assert reader.repairs[-1] == ([lost], [f"late-{lost}"])
        assert reader.session.recoveries[-1].pause_s > PATIENCE_S / 2 - 5

    story()


@scene("a 0:2, b 2:4, late 4:6", patience_s=PATIENCE_S)
async def test_a_session_is_opened_when_the_last_blocks_come(it):
    told = listen(it.client)
    reading = asyncio.ensure_future(it.read(10))
    await until(lambda: told)
    assert missing(told) == {(Span(4, 6),)}
    assert told[0][2].lost == ()
    await it["late"].start()
    reader = await reading
    assert reader.chain == ["a", "b", "late"]
    assert told[-1][2] is None


@scene("a 0:2, b 2:4, c 4:6", patience_s=20.0)
async def test_when_nobody_comes_it_says_what_is_missing_and_who_left(it):
    reader = await it.read(10)
    told = listen(it.client)
    started_s = now_s()
    await it["b"].crash()
    await it["c"].crash()
    with pytest.raises(
        (NoRouteError, PeerUnreachable), match=r"waited \d+ s: .*; lost: "
    ) as caught:
        await reader.decode(1)
    it.readers.remove(reader)
    assert 10.0 < now_s() - started_s < 22.0
    for name in "bc":
        assert f"{short(it[name].peer)} {it[name].spec.span}" in caught.value.detail
    assert told[-1][2] is None
    assert it.client.num_sessions == 0


@scene("a 0:2, b 2:4", patience_s=PATIENCE_S)
async def test_our_own_network_is_gone_for_a_minute(it):
    """Every server counts as missing, nobody is blamed, and all goes on at the same servers."""
    reader = await it.read(10)
    told = listen(it.client)
    it.network.partition([it.client.me])
    decoding = asyncio.ensure_future(reader.decode(2))
    await asyncio.sleep(60.0)
    assert set().union(*missing(told)) == {Span(0, 2), Span(2, 4)}
    assert it.client.experience.snapshot(now_s()).avoid == frozenset()
    it.network.heal()
    await decoding
    assert told[-1][2] is None
    assert reader.chain == ["a", "b"]
