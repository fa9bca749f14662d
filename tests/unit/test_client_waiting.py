"""What the user of a session without a chain is told, and when."""

import asyncio

import pytest

from shoal.base.errors import NoRouteError, PeerBusy, PeerUnreachable
from shoal.base.spans import Span
from shoal.client.session import Trouble
from shoal.client.waiting import gave_up, waiting_for
from shoal.lab.clock import run_virtual
from shoal.plan.view import Stage
from tests.unit.plan_cases import peer, server
from tests.unit.test_client_repair import (
    PATIENCE_S,
    SPARE,
    Servers,
    make_state,
    now_s,
    story,
    supervise,
)

CHAIN = (Stage(peer=peer(1), span=Span(0, 2)), Stage(peer=peer(2), span=Span(2, 4)))
UNREACHABLE, BUSY = PeerUnreachable("no answer"), PeerBusy("place 2 in line", retry_after_s=4.0)


@pytest.mark.parametrize(
    ("error", "refused", "chosen", "missing", "lost", "text"),
    [
        (NoRouteError("x", missing=[(2, 4)]), {}, (), [(2, 4)], [2], "no server for blocks [2,4)"),
        (UNREACHABLE, {peer(1): UNREACHABLE}, CHAIN, [(0, 2)], [1, 2], "blocks [0,2)"),
        (BUSY, {peer(1): BUSY}, CHAIN, [], [2], "place 2 in line"),
        (NoRouteError("they keep failing"), {}, CHAIN, [], [2], "they keep failing"),
    ],
    ids=["no-route", "unreachable", "busy", "failing"],
)
def test_what_is_missing_and_who_left(error, refused, chosen, missing, lost, text):
    waiting = waiting_for(
        error, CHAIN, {peer(2)}, refused, chosen, patience_s=60.0, deadline_s=100.0
    )
    assert [(span.start, span.end) for span in waiting.missing] == missing
    assert waiting.lost == tuple(CHAIN[number - 1] for number in lost)
    assert text in str(waiting)
    final = gave_up(error, waiting, 100.0)
    assert type(final) is type(error)
    assert final.retry_after_s == error.retry_after_s
    assert "waited 60 s: " in final.detail
    assert "[2,4)" in final.detail, "who left is named with its blocks"
    if isinstance(final, NoRouteError):
        assert [tuple(span) for span in final.missing] == missing


@story(*SPARE)
async def test_the_user_is_told_while_it_waits_and_when_it_goes_on(it, state, supervisor):
    assert it.told == [], "nothing to tell while all is well"
    spares, it.servers = it.servers[1:], it.servers[:1]
    state.report(Trouble(lost={peer(2)}), now_s())
    started_s = now_s()
    mending = asyncio.ensure_future(supervisor.mend())
    await asyncio.sleep(PATIENCE_S / 2)
    assert {waiting.missing for _, waiting in it.told} == {(Span(2, 4),)}
    assert {waiting.deadline_s for _, waiting in it.told} == {started_s + PATIENCE_S}
    assert {waiting.lost for _, waiting in it.told} == {(CHAIN[1],)}
    it.servers += spares[1:]
    await mending
    assert it.told[-1][1] is None
    assert state.chain[1].peer == peer(3)


def test_a_session_that_never_opens_says_why():
    async def run():
        it = Servers(server(1, 0, 2))
        with pytest.raises(NoRouteError, match=r"waited \d+ s: .*\[2,4\)") as caught:
            await supervise(it, make_state()).mend()
        assert caught.value.missing == ((2, 4),)
        assert [waiting is None for _, waiting in it.told].count(True) == 1
        assert it.told[-1][1] is None
        assert it.told[0][1].lost == ()

    run_virtual(run)


def test_who_needs_no_patience_is_told_nothing():
    async def run():
        it = Servers(*SPARE)
        it.refusing = {peer(2): PeerBusy("full", retry_after_s=1.0)}
        await supervise(it, make_state()).mend()
        assert [waiting is None for _, waiting in it.told] == [False, True]

    run_virtual(run)
