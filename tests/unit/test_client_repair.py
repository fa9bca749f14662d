"""What a repair decides, in a swarm where each server does what the test says."""

import asyncio
import random

import pytest

from shoal.base.errors import AdapterBad, NoRouteError, PeerBusy, PeerMisbehaved, ShoalError
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.client.experience import ExperienceBook
from shoal.client.repair import Supervisor
from shoal.client.routing import Followed, RouteFacts
from shoal.client.session import SessionState, Trouble
from shoal.lab.clock import run_virtual
from shoal.plan.routing import Wanted
from shoal.wire.messages import WANT_ALL
from tests.unit.plan_cases import hops, peer, server, swarm

ME = PeerId(b"m" * 32)
PATIENCE_S = 20.0


class Servers:
    """A Swarm: who is there, who answers, who refuses."""

    def __init__(self, *servers):
        self.me = ME
        self.experience = ExperienceBook()
        self.rng = random.Random(0)
        self.patience_s = PATIENCE_S
        self.told = []
        self.servers = list(servers)
        self.silent, self.refusing = set(), {}
        self.dismissed, self.installed, self.ended = [], [], []

    def view(self):
        return swarm(4, *self.servers)

    def on_waiting(self, session, waiting):
        self.told.append((now_s(), waiting))

    async def wait_for_news(self, timeout_s):
        await asyncio.sleep(timeout_s)

    async def install(self, state, facts, chain, standbys=()):
        state.follow(chain, state.epoch + 1, ME, standbys)
        self.installed.append((now_s(), hops(state.chain)))
        refused = {one.peer: self.refusing[one.peer] for one in chain if one.peer in self.refusing}
        held = {(one.peer, one.span.start): 0 for one in chain if one.peer not in refused}
        return Followed(held=held, ready=held, refused=refused)

    async def decode_s_per_block(self, who):
        return 0.0

    async def answers(self, who):
        await asyncio.sleep(0.1)
        return who not in self.silent

    def end(self, state, error):
        state.fail(error)
        state.stirred.set()
        self.ended.append(error)

    def dismiss(self, state, peers):
        self.dismissed += peers


def now_s():
    return asyncio.get_running_loop().time()


def make_state():
    return SessionState(SessionId(b"s" * 16), Span(0, 4), "float32", 8)


def supervise(servers, state):
    facts = RouteFacts(
        nonce=b"n" * 16, model="m", opened_ms=1, encoding="float32", inner_encoding="float32"
    )
    return Supervisor(servers, state, facts, Wanted(encoding="float32"))


def story(*servers):
    """The test gets a swarm, a session that is open and waits for rows, and its supervisor."""

    def decorate(test):
        async def run():
            it = Servers(*servers)
            state = make_state()
            supervisor = supervise(it, state)
            await supervisor.mend()
            state.append(bytes(32), 1, WANT_ALL)
            await test(it, state, supervisor)

        def wrapped():
            run_virtual(run)

        wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
        return wrapped

    return decorate


SPARE = (server(1, 0, 2), server(2, 2, 4), server(3, 2, 4, decode_s=0.05))


@story(*SPARE)
async def test_only_the_lost_hop_is_replaced(it, state, supervisor):
    assert hops(state.chain) == [(1, 0, 2), (2, 2, 4)]
    state.report(Trouble(lost={peer(2)}), now_s())
    await supervisor.mend()
    assert hops(state.chain) == [(1, 0, 2), (3, 2, 4)]
    assert it.dismissed == [peer(2)]
    assert it.experience.snapshot(now_s()).avoid == {peer(2)}
    state.advanced(now_s())
    (recovery,) = state.recoveries
    assert (recovery.lost, recovery.replacement) == ((peer(2),), (peer(3),))


@story(*SPARE)
async def test_who_is_out_of_step_is_asked_and_nobody_replaced(it, state, supervisor):
    state.report(Trouble(is_out_of_step=True), now_s())
    await supervisor.mend()
    assert state.epoch == 2
    assert hops(state.chain) == [(1, 0, 2), (2, 2, 4)]
    assert state.recoveries == []
    assert it.experience.snapshot(now_s()).avoid == frozenset()


@pytest.mark.parametrize(
    ("silent", "chain"),
    [
        (set(), [(1, 0, 2), (2, 2, 4)]),
        ({2}, [(1, 0, 2), (3, 2, 4)]),
        ({1}, [(4, 0, 2), (2, 2, 4)]),
    ],
    ids=["neither", "receiver", "sender"],
)
def test_of_a_broken_link_the_silent_end_is_lost(silent, chain):
    @story(*SPARE, server(4, 0, 2, decode_s=0.05))
    async def inner(it, state, supervisor):
        it.silent = {peer(number) for number in silent}
        state.report(Trouble(links={(peer(1), peer(2))}), now_s())
        await supervisor.mend()
        assert [hop for hop in hops(state.chain) if hop[1] < hop[2]] == chain
        pairs = it.experience.snapshot(now_s()).unreachable_pairs
        assert bool(pairs) == (not silent)
        assert len(state.chain) == (2 if silent else 3), "the client relays"

    inner()


@story(*SPARE)
async def test_when_nobody_answers_it_is_our_own_link(it, state, supervisor):
    it.silent = {peer(number) for number in (1, 2, 3)}
    state.report(Trouble(lost={peer(1), peer(2)}), now_s())
    await supervisor.mend()
    assert hops(state.chain) == [(1, 0, 2), (2, 2, 4)]
    assert it.experience.snapshot(now_s()).avoid == frozenset()


@story(*SPARE)
async def test_without_a_replacement_it_ends_within_the_patience(it, state, supervisor):
    it.servers = it.servers[:1]
    started_s = now_s()
    state.report(Trouble(lost={peer(2)}), started_s)
    with pytest.raises(NoRouteError) as caught:
        await supervisor.mend()
    assert caught.value.missing == ((2, 4),)
    assert PATIENCE_S / 2 <= now_s() - started_s <= PATIENCE_S


@story(*SPARE)
async def test_repairs_that_bring_no_row_end_too(it, state, supervisor):
    """Each of them works; between them the session waits longer and longer."""
    running = asyncio.ensure_future(supervisor.run())
    started_s = now_s()
    while not it.ended and now_s() - started_s < 10 * PATIENCE_S:
        state.report(Trouble(lost={state.chain[1].peer}), now_s())
        await asyncio.sleep(0.01)
    await running
    assert PATIENCE_S <= now_s() - started_s <= 2 * PATIENCE_S
    assert len(it.ended) == 1
    assert isinstance(it.ended[0], ShoalError)
    assert len(it.installed) < 40


@story(*SPARE)
async def test_a_row_in_between_renews_the_patience(it, state, supervisor):
    for _ in range(10):
        state.report(Trouble(lost={state.chain[1].peer}), now_s())
        await supervisor.mend()
        await asyncio.sleep(PATIENCE_S)
        state.advanced(now_s())
    assert state.epoch == 11


@pytest.mark.parametrize(
    ("error", "until_s"),
    [(PeerBusy("full", retry_after_s=7.0), 7.0), (PeerMisbehaved("odd"), 0.0)],
)
def test_who_refuses_is_passed_over(error, until_s):
    """A busy server is avoided for as long as it says, and keeps its good name."""

    async def run():
        it = Servers(*SPARE)
        it.refusing = {peer(2): error}
        state = make_state()
        await supervise(it, state).mend()
        assert hops(state.chain) == [(1, 0, 2), (3, 2, 4)]
        if until_s:
            assert not it.experience.has_failures
            assert it.experience.snapshot(until_s - 0.5).avoid == {peer(2)}
            assert it.experience.snapshot(until_s + 0.5).avoid == frozenset()

    run_virtual(run)


BAD = AdapterBad("no layer of that name")


@pytest.mark.parametrize(
    ("servers", "refusing", "ends"),
    [(SPARE, {2}, False), (SPARE, {2, 3}, True), (SPARE[:2], {2}, True)],
    ids=["one of two", "both", "the only one"],
)
def test_one_servers_word_on_an_adapter_is_not_enough(servers, refusing, ends):
    async def run():
        it = Servers(*servers)
        it.refusing = {peer(number): BAD for number in refusing}
        state, began_s = make_state(), now_s()
        if ends:
            with pytest.raises(AdapterBad, match="no layer"):
                await supervise(it, state).mend()
        else:
            await supervise(it, state).mend()
            assert hops(state.chain) == [(1, 0, 2), (3, 2, 4)]
        assert now_s() - began_s < PATIENCE_S / 2

    run_virtual(run)


@story(*SPARE, server(4, 2, 4, numerics="other", decode_s=0.2))
async def test_a_server_of_another_numerics_class_is_owned_up_to(it, state, supervisor):
    state.report(Trouble(lost={peer(2)}), now_s())
    await supervisor.mend()
    assert (hops(state.chain)[1][0], state.numerics) == (3, "same-class")
    state.advanced(now_s())
    state.report(Trouble(lost={peer(3)}), now_s())
    it.servers = [one for one in it.servers if one.peer not in (peer(2), peer(3))]
    await supervisor.mend()
    assert (hops(state.chain)[1][0], state.numerics) == (4, "crossed")


@story(*SPARE)
async def test_a_bug_in_a_repair_ends_the_session_and_is_told(it, state, supervisor):
    it.view = None
    running = asyncio.ensure_future(supervisor.run())
    state.report(Trouble(lost={peer(2)}), now_s())
    await running
    assert [error.code for error in it.ended] == ["internal"]
