"""Routing under load: waits by hand, WS-RR against trying all chains, the dispatcher's queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.compose import composed
from shoal.plan.cost import Hop, chain_s, prices
from shoal.plan.placement import Placement
from shoal.plan.route.blind import (
    PETALS_HANDLING_S,
    PETALS_RTT_S,
    petals_prices,
    route_petals,
    route_shortest,
)
from shoal.plan.route.contract import Active, load_of
from shoal.plan.route.dispatch import route_dispatch
from shoal.plan.route.wsrr import route_wsrr, route_wsrr_max
from shoal.plan.spec import Links
from tests.unit.plan_problems import every_chain, placements, problems, simple


def whole(problem):
    return Placement(spans=(Span(0, problem.num_blocks),) * len(problem.servers))


def alone(server, blocks=4):
    return (Hop(server, Span(0, blocks)),)


def two_servers():
    """A near server with room for 1 session and a far one with room for 2; prefill only."""
    return simple([44, 48], 4, cache=1, rtt_s=[0.1, 0.5])


def test_a_load_is_what_is_booked():
    problem = two_servers()
    sessions = [Active(alone(0), 9.0), Active(alone(1), 8.0), Active(alone(1), 7.0)]
    load = load_of(problem, whole(problem), sessions, now_s=5.0)
    assert load.free == (0, 0)
    assert load.releases[1] == ((7.0, 4), (8.0, 4))
    assert load.running == {alone(0): 1, alone(1): 2}
    assert [load.wait_s(1, size) for size in (0, 4, 5, 8, 9)] == [0.0, 2.0, 3.0, 3.0, float("inf")]
    late = load_of(problem, whole(problem), sessions, now_s=10.0)
    assert late.wait_s(0, 4) == 0.0


def test_the_shortest_chain_waits_where_wsrr_goes_round():
    problem = two_servers()
    placement = whole(problem)
    busy = load_of(problem, placement, [Active(alone(0), 3.0)])
    assert route_shortest(problem, placement)(busy, 0) == (alone(0), 3.0)
    for make in (route_wsrr, route_wsrr_max):
        assert make(problem, placement)(busy, 0) == (alone(1), 0.0)
    soon = load_of(problem, placement, [Active(alone(0), 0.3)])
    for make in (route_wsrr, route_wsrr_max):
        assert make(problem, placement)(soon, 0) == (alone(0), 0.3)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_wsrr_takes_the_least_sum_and_the_least_maximum(data):
    problem = data.draw(problems(blocks_max=4, clients_max=1))
    placement = data.draw(placements(problem))
    chains = list(every_chain(problem, placement, "end"))
    if not chains:
        return
    some = st.tuples(st.sampled_from(chains), st.sampled_from([0.01, 0.05, 0.2]))
    sessions = [Active(*one) for one in data.draw(st.lists(some, max_size=6))]
    load = load_of(problem, placement, sessions)
    price = prices(problem, 0, "request")

    def waits(chain):
        return [load.wait_s(hop.server, problem.session_bytes(hop.span)) for hop in chain]

    possible = [chain for chain in chains if max(waits(chain)) < float("inf")]
    for make, rule in ((route_wsrr, sum), (route_wsrr_max, max)):
        if not possible:
            with pytest.raises(NoRouteError, match="hold even one session"):
                make(problem, placement)(load, 0)
            continue
        choice = make(problem, placement)(load, 0)
        least = min(rule(waits(chain)) + chain_s(price, chain) for chain in possible)
        taken = rule(waits(choice.chain)) + chain_s(price, choice.chain)
        assert taken == pytest.approx(least)
        assert choice.wait_s == max(waits(choice.chain))


def test_petals_believes_its_own_prices():
    problem = simple([100, 100], 4, rtt_s=[0.1, 20.0], block_s=[0.01, 0.02])
    price = petals_prices(problem, 0)
    assert price.arrive == pytest.approx((0.05 + PETALS_HANDLING_S, 5.0 + PETALS_HANDLING_S))
    assert price.leave == pytest.approx((0.05, 5.0))
    assert price.block == (0.01, 0.02)
    assert price.between is not None
    assert price.between[0][1] == pytest.approx(PETALS_RTT_S + PETALS_HANDLING_S)
    measured = replace(
        problem, links=Links(client_rtt_s=((0.1, 0.1),), server_rtt_s=((0.0, 0.04),) * 2)
    )
    between = petals_prices(measured, 0).between
    assert between is not None
    assert between[0][1] == pytest.approx(0.02 + PETALS_HANDLING_S)


def test_petals_avoids_a_full_server_but_not_at_any_price():
    problem = two_servers()
    placement = whole(problem)
    choose = route_petals(problem, placement)
    assert choose(load_of(problem, placement), 0) == (alone(0), 0.0)
    assert choose(load_of(problem, placement, [Active(alone(0), 3.0)]), 0) == (alone(1), 0.0)
    full = [Active(alone(0), 3.0), Active(alone(1), 4.0), Active(alone(1), 9.0)]
    assert choose(load_of(problem, placement, full), 0) == (alone(0), 3.0)


def test_the_dispatcher_fills_chains_and_then_queues():
    problem = two_servers()
    placement = whole(problem)
    choose = route_dispatch(problem, placement)
    assert [one.seats for one in composed(problem, placement)] == [1, 2]
    sessions = []
    for chain in (alone(0), alone(1), alone(1)):
        choice = choose(load_of(problem, placement, sessions), 0)
        assert choice == (chain, 0.0)
        sessions.append(Active(chain, 9.0))
    assert choose(load_of(problem, placement, sessions), 0) is None
    freed = sessions[1:]
    assert choose(load_of(problem, placement, freed), 0) == (alone(0), 0.0)


def test_each_client_has_its_own_way():
    problem = replace(two_servers(), links=Links(client_rtt_s=((0.1, 0.5), (0.5, 0.1))))
    placement = whole(problem)
    for make in (route_shortest, route_wsrr, route_wsrr_max, route_petals):
        choose = make(problem, placement)
        load = load_of(problem, placement)
        assert [choose(load, client).chain[0].server for client in (0, 1)] == [0, 1]


def test_a_session_that_fits_nowhere_is_an_error():
    problem = simple([41], 4, cache=1)
    placement = whole(problem)
    for make in (route_wsrr, route_wsrr_max):
        with pytest.raises(NoRouteError, match=r"1 \+ 1 tokens"):
            make(problem, placement)(load_of(problem, placement), 0)
    with pytest.raises(NoRouteError, match=r"1 \+ 1 tokens"):
        route_dispatch(problem, placement)
