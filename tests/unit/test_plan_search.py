"""The search for the cheapest chain: against trying all chains, and the live router's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.plan.compose import compose_chains, mean_s, needs_on, predict, room_of, scorer, seats_on
from shoal.plan.cost import Hop, chain_s, hub_entry_s, prices
from shoal.plan.placement import Placement
from shoal.plan.search import Search
from shoal.plan.shortest import Blemish, Leg, Task, cheapest_path
from shoal.plan.spec import DecodeTimes
from shoal.plan.ways import Place, Ways
from tests.unit.plan_cases import peer
from tests.unit.plan_problems import (
    cheapest_of_all,
    check_route,
    placements,
    problems,
    simple,
)

MANY = settings(max_examples=30, deadline=None)


@given(st.data())
@MANY
def test_the_cheapest_chain_is_found(data):
    exits = data.draw(st.sampled_from(["end", "anywhere"]))
    problem = data.draw(problems(blocks_max=5, exits=exits))
    placement = data.draw(placements(problem))
    price = prices(problem, 0, data.draw(st.sampled_from(["token", "request"])))
    found = Search(problem, placement, price).cheapest()
    best = cheapest_of_all(problem, placement, price, exits)
    if best is None or found is None:
        assert found is None
        assert best is None
        return
    assert found.seconds == pytest.approx(best)
    assert found.seconds == pytest.approx(chain_s(price, found.chain))
    check_route(problem, placement, found.chain)


@given(st.data())
@MANY
def test_one_search_serves_every_client(data):
    problem = data.draw(problems(blocks_max=5))
    placement = data.draw(placements(problem))
    each = [prices(problem, client, "token") for client in range(problem.num_clients)]
    other_batch = prices(problem, 0, "token", batch=4)
    search = Search(problem, placement, each[0])
    for price in (*each, other_batch):
        assert search.at(price).cheapest() == Search(problem, placement, price).cheapest()
    assert search.cheapest() == Search(problem, placement, each[0]).cheapest()


@given(st.data())
@MANY
def test_waits_count_and_full_servers_are_passed_by(data):
    problem = data.draw(problems(blocks_max=5))
    placement = data.draw(placements(problem))
    price = prices(problem, 0, "token")
    waits = [data.draw(st.sampled_from([0.0, 0.0, 0.02, 0.3])) for _ in problem.servers]
    extras = [(lambda span, wait=wait: wait / len(span)) if wait else None for wait in waits]
    found = Search(problem, placement, price).cheapest(extras=extras)
    best = cheapest_of_all(problem, placement, price, "end", extras)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.seconds == pytest.approx(best)
    room = room_of(problem, placement)
    roomy = Search(problem, placement, price).cheapest(room=room)
    if roomy is not None:
        assert all(problem.session_bytes(hop.span) <= room[hop.server] for hop in roomy.chain)


@given(st.data())
@MANY
def test_with_hub_prices_and_exits_anywhere_it_agrees_with_the_live_search(data):
    problem = data.draw(problems(flow="hub", exits="anywhere"))
    placement = data.draw(placements(problem))
    price = prices(problem, 0, "token")
    legs = [
        Leg(
            peer=peer(one),
            span=span,
            blemish=Blemish(),
            seconds=price.arrive[one] - hub_entry_s(0.0),
            seconds_per_block=price.block[one],
        )
        for one, span in placement.hosted()
    ]
    free = Ways({one.peer: Place(rtt_s=0.0) for one in legs}, flow="hub")
    live = cheapest_path(Task(span=Span(0, problem.num_blocks), ways=free), legs)
    found = Search(problem, placement, price).cheapest()
    if live is None or found is None:
        assert live is None
        assert found is None
        return
    hops = [Hop(int.from_bytes(stage.peer, "big"), stage.span) for stage in live]
    assert found.seconds == pytest.approx(chain_s(price, hops))


@given(st.data())
@MANY
def test_composed_chains_never_take_more_memory_than_there_is(data):
    exits = data.draw(st.sampled_from(["end", "anywhere"]))
    problem = data.draw(problems(exits=exits))
    placement = data.draw(placements(problem))
    chains = compose_chains(problem, placement, prices(problem, 0, "token"), sessions_max=50)
    room = room_of(problem, placement)
    for one in chains:
        assert one.seats >= 1
        for server, need in needs_on(problem, one.chain).items():
            room[server] -= one.seats * need
    assert min(room) >= 0
    assert sum(one.seats for one in chains) <= 50
    if exits == "end":
        assert [one.seconds for one in chains] == sorted(one.seconds for one in chains)


def test_chains_fill_up_fastest_first():
    """Two servers of all blocks: one fast with room for 2, one slow with room for 3."""
    problem = simple([44, 49], 4, cache=1, rtt_s=[0.1, 0.2], block_s=[0.0, 0.0], sessions=4)
    problem = replace(
        problem, servers=(problem.servers[0], replace(problem.servers[1], memory_bytes=52))
    )
    placement = Placement(spans=(Span(0, 4), Span(0, 4)))
    chains = compose_chains(problem, placement, prices(problem, 0, "token"))
    assert [(one.seconds, one.seats) for one in chains] == [(0.1, 1), (0.2, 3)]
    assert mean_s(problem, placement) == pytest.approx((0.1 + 3 * 0.2) / 4)
    assert mean_s(problem, placement, sessions=5) == float("inf")


def test_a_score_says_what_is_amiss_first():
    problem = simple([40, 40], 4, sessions=2, cache=5)
    score = scorer(problem)
    assert score(Placement(spans=(Span(0, 3), None)))[:2] == (1, 2)
    assert score(Placement(spans=(Span(0, 4), None)))[:2] == (0, 2)
    assert score(Placement(spans=(Span(0, 2), Span(2, 4))))[:2] == (0, 0)
    heavy = simple([10, 10], 4)
    assert scorer(heavy)(Placement(spans=(Span(0, 4), None))).uncovered


def test_a_server_that_is_visited_twice_needs_room_for_both_runs():
    problem = simple([100], 4, cache=1)
    chain = (Hop(0, Span(0, 1)), Hop(0, Span(3, 4)))
    assert needs_on(problem, chain) == {0: 2}
    assert seats_on(problem, chain, [5]) == 2


def test_sessions_in_step_share_passes():
    """Three sessions, two of them on the near server: batches of 2 and 1."""
    problem = simple([48, 48], 4, cache=1, rtt_s=[0.1, 0.3], sessions=3)
    times = DecodeTimes(points=((1, 0.01), (2, 0.015)))
    problem = replace(problem, servers=tuple(replace(one, decode=times) for one in problem.servers))
    placement = Placement(spans=(Span(0, 4), Span(0, 4)))
    found = predict(problem, placement)
    assert found.batches == (2, 1)
    assert found.step_s == pytest.approx((2 * (0.1 + 0.06) + 0.3 + 0.04) / 3)
    assert found.tokens_per_s == pytest.approx(2 / 0.16 + 1 / 0.34)
    crowd = predict(problem, placement, sessions=9)
    assert (crowd.unplaced, crowd.batches) == (5, (2, 2))
    nothing = predict(problem, Placement(spans=(None, None)))
    assert (nothing.step_s, nothing.tokens_per_s, nothing.unplaced) == (float("inf"), 0, 3)
