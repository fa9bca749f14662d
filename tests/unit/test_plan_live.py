"""Live placement: where to join, when to move, and who may leave its blocks."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.live import (
    Burden,
    LivePolicy,
    Swarm,
    choose_join,
    choose_move,
    moved,
    objective,
    swarm_of,
)
from shoal.plan.rebalance import (
    CONVERGENCE_S,
    WAIT_S,
    may_leave,
    next_ticket,
    trusted,
    uncovered,
)
from shoal.plan.view import Intent, ServerState, ServerView, SwarmView

BLOCKS = 12
POLICIES: tuple[LivePolicy, ...] = ("petals", "latency")


def server(
    number: int,
    start: int,
    end: int,
    *,
    state: ServerState = "online",
    speed: float = 1.0,
    intent: Intent | None = None,
    cache_tokens: int = 8192,
) -> ServerView:
    return ServerView(
        peer=PeerId(bytes([number]) * 32),
        addresses=(),
        span=Span(start, end),
        state=state,
        cache_tokens=cache_tokens,
        decode_s_per_block=0.01 / speed,
        prefill_s_per_block_token=0.001 / speed,
        intent=intent,
    )


def view(*servers: ServerView) -> SwarmView:
    return SwarmView(model="m", num_blocks=BLOCKS, hidden_size=8, servers=servers)


NEWCOMER = server(99, 0, 1)


def join(policy: LivePolicy, wanted: int, *servers: ServerView) -> Span:
    return choose_join(policy, swarm_of(view(*servers)), wanted, NEWCOMER)


# --- joining -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_holes_are_filled_first(policy: LivePolicy) -> None:
    assert join(policy, 4) == Span(0, 4)
    assert join(policy, 6, server(1, 0, 6)) == Span(6, 12)
    assert join(policy, 4, server(1, 0, 4), server(2, 8, 12)) == Span(4, 8)
    assert join(policy, 6, server(1, 0, 6, state="joining")) == Span(6, 12)
    assert join(policy, 6, server(1, 0, 6, state="draining")) == Span(0, 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_going_counts_where_it_will_be(policy: LivePolicy) -> None:
    going = Intent(ticket=1, span=Span(6, 12), is_going=True)
    assert join(policy, 6, server(1, 0, 6, intent=going)) == Span(0, 6)
    wanting = replace(going, is_going=False)
    assert join(policy, 6, server(1, 0, 6, intent=wanting)) == Span(6, 12)


def test_whoever_has_an_earlier_ticket_counts_where_it_wants_to_be() -> None:
    seen = view(server(1, 0, 6, intent=Intent(ticket=4, span=Span(6, 12))))
    assert swarm_of(seen, before=(4, seen.servers[0].peer)).servers[0].span == Span(0, 6)
    assert swarm_of(seen, before=(5, b"")).servers[0].span == Span(6, 12)


def test_latency_ends_where_others_begin() -> None:
    """Petals' window may begin anywhere; a short chain needs borders that meet."""
    servers = [server(1, 0, 6), server(2, 6, 12), server(3, 0, 7, speed=0.2)]
    assert join("latency", 6, *servers) in (Span(0, 6), Span(6, 12))


@pytest.mark.parametrize("wanted", [0, 13])
def test_more_blocks_than_there_are_is_refused(wanted: int) -> None:
    with pytest.raises(ConfigError, match="12 blocks; ask for 1 to 12"):
        join("latency", wanted)


# --- moving --------------------------------------------------------------------------------


@st.composite
def swarms(draw: st.DrawFn) -> Swarm:
    """Some servers anywhere; often they don't cover all blocks."""
    servers = []
    for number in range(1, draw(st.integers(2, 7)) + 1):
        length = draw(st.integers(2, 8))
        start = draw(st.integers(0, BLOCKS - length))
        speed = draw(st.sampled_from([0.25, 1.0, 4.0]))
        servers.append(server(number, start, start + length, speed=speed))
    return swarm_of(view(*servers))


@pytest.mark.parametrize("policy", POLICIES)
@given(swarm=swarms(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_moves_end_and_each_one_gains(policy: LivePolicy, swarm: Swarm, seed: int) -> None:
    rng = random.Random(seed)
    before = objective(policy, swarm)
    for _ in range(200):
        for mine in rng.sample(range(len(swarm.servers)), len(swarm.servers)):
            target = choose_move(policy, swarm, mine, rng)
            if target is not None:
                break
        else:
            return
        assert len(target) == len(swarm.servers[mine].span)
        swarm = moved(swarm, mine, target)
        after = objective(policy, swarm)
        assert after < before
        before = after
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hole_is_worth_a_move(policy: LivePolicy) -> None:
    swarm = swarm_of(view(server(1, 0, 6), server(2, 0, 6), server(3, 0, 6)))
    target = choose_move(policy, swarm, 0, random.Random(1))
    assert target == Span(6, 12)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_gain_does_not_pay_for_many_sessions(policy: LivePolicy) -> None:
    # One half has three servers, the other one.
    swarm = swarm_of(view(*(server(n, 0, 6) for n in (1, 2, 3)), server(4, 6, 12)))
    rng = random.Random(1)
    assert choose_move(policy, swarm, 0, rng) == Span(6, 12)
    assert choose_move(policy, swarm, 0, rng, Burden(sessions=5, delay_s=1.0)) == Span(6, 12)
    assert choose_move(policy, swarm, 0, rng, Burden(sessions=5, delay_s=1e6)) is None


def test_a_server_must_see_itself() -> None:
    with pytest.raises(ConfigError, match="not in its own view"):
        swarm_of(view()).index(NEWCOMER.peer)


# --- leaving -------------------------------------------------------------------------------


def wants(ticket: int, *, is_going: bool = False) -> Intent:
    return Intent(ticket=ticket, span=Span(6, 12), is_going=is_going)


def other(
    start: int, end: int, intent: Intent | None = None, state: ServerState = "online"
) -> ServerView:
    return server(2, start, end, intent=intent, state=state)


@pytest.mark.parametrize(
    ("beside", "may"),
    [
        ([other(0, 6)], True),
        ([other(0, 5)], False),
        ([], False),
        ([other(0, 6, state="joining")], False),
        ([other(0, 6, state="draining")], False),
        ([other(0, 6, wants(4))], False),
        ([other(0, 6, wants(5))], True),  # an equal ticket: the lower id, ours, goes first
        ([other(0, 6, wants(9))], True),
        ([other(0, 6, wants(9, is_going=True))], False),
    ],
)
def test_who_may_leave(beside: list[ServerView], may: bool) -> None:
    me = server(1, 0, 6)
    seen = view(me, server(3, 6, 12), *beside)
    assert may_leave(seen, me.peer, Span(6, 12), 5) is may
    assert next_ticket(seen) == 1 + max(
        (one.intent.ticket for one in beside if one.intent), default=0
    )


def test_a_suspect_covers_nothing() -> None:
    me, twin = server(1, 0, 6), server(2, 0, 6)
    seen = view(me, twin, server(3, 6, 12))
    assert may_leave(seen, me.peer, Span(6, 12), 1)
    assert not may_leave(trusted(seen, frozenset({twin.peer})), me.peer, Span(6, 12), 1)


def test_what_loads_or_is_on_its_way_is_no_hole() -> None:
    assert uncovered(view(server(1, 0, 6))) == [Span(6, 12)]
    assert uncovered(view(server(1, 0, 6), other(6, 12, state="draining"))) == [Span(6, 12)]
    assert not uncovered(view(server(1, 0, 6), other(6, 12, state="joining")))
    assert not uncovered(view(server(1, 0, 6), other(0, 6, wants(1, is_going=True))))
    assert uncovered(view(server(1, 0, 6), other(0, 6, wants(1)))) == [Span(6, 12)]


def test_in_a_swarm_with_holes_a_move_must_leave_fewer() -> None:
    me = server(1, 0, 6)
    assert may_leave(view(me), me.peer, Span(0, 6), 1) is False
    assert may_leave(view(me, server(2, 0, 4)), me.peer, Span(6, 12), 1)  # 2 new holes for 6 old
    assert not may_leave(view(me, server(2, 6, 10)), me.peer, Span(6, 12), 1)


@dataclass
class Player:
    """A server of a game about leaving: what it is, and what it knows of the others."""

    peer: PeerId
    truth: ServerView
    known: dict[PeerId, ServerView] = field(default_factory=dict)

    def sees(self) -> SwarmView:
        return view(*{**self.known, self.peer: self.truth}.values())


class Game:
    """Servers that all want to leave, at any time; news takes up to `CONVERGENCE_S`."""

    def __init__(self, spans: list[Span], delays: st.DataObject) -> None:
        self.players = []
        for number, span in enumerate(spans, 1):
            truth = server(number, span.start, span.end)
            self.players.append(Player(truth.peer, truth))
        for one in self.players:
            one.known = {each.peer: each.truth for each in self.players}
        self._delays = delays
        self._events: list[tuple[float, int, int, str, ServerView | None]] = []
        self._numbers = itertools.count()
        self._latest_s: dict[tuple[int, PeerId], float] = {}

    def at(self, when_s: float, who: int, what: str, said: ServerView | None = None) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), who, what, said))

    def play(self) -> None:
        while self._events:
            now_s, _, who, what, said = heapq.heappop(self._events)
            player = self.players[who]
            if what == "hears" and said is not None:
                player.known[said.peer] = said
            elif what == "wants":
                intent = Intent(ticket=next_ticket(player.sees()), span=Span(0, 1))
                self._say(now_s, player, replace(player.truth, intent=intent))
                self.at(now_s + WAIT_S, who, "decides")
            elif what == "decides":
                self._decide(now_s, player)
            self.check()

    def _decide(self, now_s: float, player: Player) -> None:
        intent = player.truth.intent
        assert intent is not None
        if may_leave(player.sees(), player.peer, intent.span, intent.ticket):
            # The worst case: it is gone from its blocks at once and arrives nowhere.
            gone = replace(player.truth, intent=replace(intent, is_going=True))
            self._say(now_s, player, gone)
        else:
            self._say(now_s, player, replace(player.truth, intent=None))

    def _say(self, now_s: float, player: Player, truth: ServerView) -> None:
        player.truth = truth
        for who, other in enumerate(self.players):
            if other is not player:
                # Within means less: at exactly that, two at once may both be too late.
                delay_s = self._delays.draw(st.sampled_from([0.0, 0.3, 0.7, 0.99])) * CONVERGENCE_S
                # News of one server comes in order.
                last_s = max(now_s + delay_s, self._latest_s.get((who, player.peer), 0.0))
                self._latest_s[(who, player.peer)] = last_s
                self.at(last_s, who, "hears", truth)

    def check(self) -> None:
        there = [
            one.truth.span
            for one in self.players
            if one.truth.intent is None or not one.truth.intent.is_going
        ]
        assert not missing_blocks(Span(0, BLOCKS), there)


@given(
    spans=st.lists(
        st.sampled_from([Span(0, 6), Span(6, 12), Span(0, 12), Span(3, 9)]), min_size=1, max_size=4
    ),
    whens=st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]), min_size=5, max_size=5
    ),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_no_block_is_uncovered_however_news_is_delayed(
    spans: list[Span], whens: list[float], data: st.DataObject
) -> None:
    game = Game([Span(0, 12), *spans], data)
    for who, when in enumerate(whens[: len(game.players)]):
        game.at(when * CONVERGENCE_S, who, "wants")
    game.play()
