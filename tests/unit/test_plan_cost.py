"""The cost model: published formulas by hand, push, batches, and the live router's price."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.plan.coordinates import Coordinate, distance_s
from shoal.plan.cost import (
    HOP_S,
    Hop,
    at_batch,
    chain_s,
    hop_s,
    hub_entry_s,
    mean_prices,
    prices,
    service_s,
    typical_entries,
)
from shoal.plan.placement import Placement
from shoal.plan.routing import NEAR_TIE, choose_chain, decode_step_s
from shoal.plan.search import Search
from shoal.plan.spec import DecodeTimes, Links
from shoal.plan.view import Experience, Stage
from tests.unit.plan_cases import peer, stages, swarm
from tests.unit.plan_cases import server as server_view
from tests.unit.plan_problems import bloom, simple

CHAIN = (Hop(0, Span(0, 2)), Hop(1, Span(2, 3)))


def test_a_hub_step_is_the_round_trips_and_the_blocks():
    problem = simple([100, 100], 3, block_s=[0.01, 0.03], rtt_s=[0.1, 0.2])
    assert chain_s(prices(problem, 0, "token"), CHAIN) == pytest.approx(0.1 + 0.02 + 0.2 + 0.03)


def test_a_push_step_is_half_the_round_trips_around_the_loop():
    problem = simple([100, 100], 3, block_s=[0.01, 0.03], rtt_s=[0.1, 0.2])
    links = Links(
        client_rtt_s=((0.1, 0.2),),
        server_rtt_s=((0.0, 0.04), (0.06, 0.0)),
        flow="push",
        handling_s=0.001,
    )
    problem = replace(problem, links=links)
    loop = 0.05 + 0.02 + 0.1 + 0.002 + 0.02 + 0.03
    assert chain_s(prices(problem, 0, "token"), CHAIN) == pytest.approx(loop)
    alone = (Hop(1, Span(0, 3)),)
    assert chain_s(prices(problem, 0, "token"), alone) == pytest.approx(0.2 + 0.001 + 0.09)


def test_rows_take_time_on_links():
    problem = simple([100], 3, rtt_s=[0.0], block_s=[0.0])
    slow = replace(problem.servers[0], link_bytes_per_s=10.0)
    problem = replace(problem, servers=(slow,), model=replace(problem.model, row_bytes=5))
    one = (Hop(0, Span(0, 3)),)
    assert chain_s(prices(problem, 0, "token"), one) == pytest.approx(2 * 0.5)
    pushed = replace(problem, links=replace(problem.links, flow="push", server_rtt_s=((0.0,),)))
    assert chain_s(prices(pushed, 0, "token"), one) == pytest.approx(2 * 0.5)


def test_a_request_by_the_published_formula_and_constants():
    """BPRR on one A100 with 60 blocks and one slice with 10: every term by hand."""
    problem = bloom(1, 1, [0.004, 0.01], rate=0.1, tokens_out=128)
    chain = (Hop(0, Span(0, 60)), Hop(1, Span(60, 70)))
    prefill = sum(raw + 0.0007049 * 20 + 0.067 for raw in (0.004, 0.01))
    prefill += 60 * (0.0000743 * 20 + 0.03299) + 10 * (0.0001041 * 20 + 0.2063547)
    step = 0.104 + 60 * 0.0032197 + 0.11 + 10 * 0.0162488
    assert service_s(problem, 0, chain) == pytest.approx(prefill + 127 * step)


def test_decode_time_follows_the_batch():
    problem = simple([100], 3, rtt_s=[0.0])
    times = DecodeTimes(points=((1, 0.01), (11, 0.03)))
    problem = replace(problem, servers=(replace(problem.servers[0], decode=times),))
    one = (Hop(0, Span(0, 3)),)
    assert chain_s(prices(problem, 0, "token", batch=1), one) == pytest.approx(0.03)
    assert chain_s(prices(problem, 0, "token", batch=6), one) == pytest.approx(0.06)


def test_mean_prices_are_the_mean_over_clients():
    problem = simple([100, 100], 3)
    rows = ((0.1, 0.2), (0.3, 0.6))
    hub = replace(problem, links=Links(client_rtt_s=rows))
    assert mean_prices(hub, "token").arrive == pytest.approx((0.2, 0.4))
    push = replace(
        problem,
        links=Links(client_rtt_s=rows, server_rtt_s=((0.0, 0.2), (0.2, 0.0)), flow="push"),
    )
    mean = mean_prices(push, "token")
    assert mean.leave == pytest.approx((0.1, 0.2))
    assert mean.between is not None
    assert mean.between[0][1] == pytest.approx(0.1)


def test_typical_entries_are_the_worst_clients_or_the_nearest_peers():
    problem = simple([100, 100], 3)
    rows = ((0.1, 0.2), (0.3, 0.6))
    hub = replace(problem, links=Links(client_rtt_s=rows))
    assert typical_entries(hub, "token") == pytest.approx([0.3, 0.6])
    assert typical_entries(hub, "token", mean=True) == pytest.approx([0.2, 0.4])
    push = replace(
        problem,
        links=Links(client_rtt_s=rows, server_rtt_s=((0.0, 0.2), (0.4, 0.0)), flow="push"),
    )
    assert typical_entries(push, "token") == pytest.approx([0.2, 0.1])


CHAIN_HERE = (Hop(0, Span(0, 3)), Hop(1, Span(3, 5)))
STAGES_HERE = stages((1, 0, 3), (2, 3, 5))


@pytest.mark.parametrize("flow", ["push", "hub"])
def test_the_live_router_prices_as_a_hub_what_it_can_t_know(flow):
    """Without coordinates a way between servers takes what it takes by way of the client."""
    view = swarm(5, server_view(1, 0, 3, decode_s=0.02), server_view(2, 3, 5, decode_s=0.005))
    experience = Experience(rtt_s={peer(1): 0.04, peer(2): 0.1})
    live = decode_step_s(STAGES_HERE, view, experience, flow)
    problem = simple([100, 100], 5, block_s=[0.02, 0.005], rtt_s=[0.04, 0.1])
    problem = replace(problem, links=replace(problem.links, handling_s=HOP_S))
    assert live == pytest.approx(chain_s(prices(problem, 0, "token"), CHAIN_HERE))
    assert live == pytest.approx(
        hop_s(hub_entry_s(0.04), 0.02, 3) + hop_s(hub_entry_s(0.1), 0.005, 2)
    )


SPOT = st.builds(
    Coordinate,
    point=st.tuples(*[st.floats(-0.1, 0.1)] * 3),
    height=st.floats(0, 0.02),
    error=st.just(0.1),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_where_round_trips_are_distances_the_live_router_has_the_planners_price(data):
    """Of any chain; and the chain that its search finds is the cheapest that planners find."""
    client, *spots = data.draw(st.lists(SPOT, min_size=3, max_size=6))
    count, blocks = len(spots), 5
    ends = st.tuples(st.integers(0, blocks - 1), st.integers(1, blocks)).filter(
        lambda x: x[0] < x[1]
    )
    others = [Span(*data.draw(ends)) for _ in spots[1:]]
    placement = Placement(spans=(Span(0, blocks), *others))
    times = [data.draw(st.sampled_from([0.002, 0.01, 0.05])) for _ in spots]
    view = swarm(
        blocks,
        *(
            replace(server_view(one, span.start, span.end, decode_s=times[one]), coordinate=spot)
            for one, (span, spot) in enumerate(zip((Span(0, blocks), *others), spots, strict=True))
        ),
    )
    asked = data.draw(st.sets(st.integers(0, count - 1)))
    experience = Experience(
        rtt_s={peer(one): distance_s(client, spots[one]) for one in asked}, coordinate=client
    )
    links = Links(
        client_rtt_s=(tuple(distance_s(client, spot) for spot in spots),),
        server_rtt_s=tuple(
            tuple(0.0 if one is other else distance_s(one, other) for other in spots)
            for one in spots
        ),
        flow="push",
        handling_s=HOP_S,
    )
    problem = simple([100] * count, blocks, block_s=times)
    problem = replace(problem, links=links, exits="anywhere")
    price = prices(problem, 0, "token")
    best = Search(problem, placement, price).cheapest()
    assert best is not None
    live = tuple(Stage(peer=peer(hop.server), span=hop.span) for hop in best.chain)
    assert decode_step_s(live, view, experience) == pytest.approx(best.seconds, abs=1e-4)
    found = choose_chain(view, Span(0, blocks), experience, random.Random(0))
    assert decode_step_s(found, view, experience) <= best.seconds * (1 + NEAR_TIE) + 1e-4


@pytest.mark.parametrize("currency", ["token", "request"])
@pytest.mark.parametrize("is_push", [False, True])
def test_larger_passes_change_blocks_alone(currency, is_push):
    problem = simple([100, 100], 3, rtt_s=[0.1, 0.2])
    times = DecodeTimes(points=((1, 0.01), (8, 0.03)))
    servers = tuple(replace(one, decode=times) for one in problem.servers)
    workload = replace(problem.workload, tokens_in=5, tokens_out=7)
    problem = replace(problem, servers=servers, workload=workload)
    if is_push:
        links = replace(problem.links, flow="push", server_rtt_s=((0.0, 0.04), (0.06, 0.0)))
        problem = replace(problem, links=links)
    alone = prices(problem, 0, currency)
    assert at_batch(problem, alone, currency, 5) == prices(problem, 0, currency, batch=5)
