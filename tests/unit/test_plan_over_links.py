"""Ways between servers that carry so much: what gets through, and plans that know."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.advice import advise
from shoal.plan.bounds import throughput_bound
from shoal.plan.cost import Hop, chain_s, prices
from shoal.plan.memory import CacheShape
from shoal.plan.over_links import rows_over_links
from shoal.plan.place.flow import plan_flow
from shoal.plan.placement import Placement, free_bytes, uncovered
from shoal.plan.proposal import propose
from shoal.plan.rates import capped_rates, rows_through
from shoal.plan.spec import DecodeTimes, Links, Problem, Workload, uniform_model
from shoal.plan.trying import LINKED, Budget
from tests.unit.plan_problems import placements, problems, server

QUICK = Budget(moves_max=60)


def sites(where, blocks=4, memory=24, between=8.0):
    """Servers of two blocks each (100 rows/s through one) by site, in this order."""
    count = len(where)
    return Problem(
        model=uniform_model(blocks, 10, CacheShape(values_per_token=0, state_bytes=1)),
        servers=tuple(server(memory, 0.01, name=f"{one}{i}") for i, one in enumerate(where)),
        links=Links(
            client_rtt_s=((0.01,) * count,),
            server_rtt_s=((0.01,) * count,) * count,
            server_bytes_per_s=tuple(
                tuple(math.inf if one == other else between for other in where) for one in where
            ),
            flow="push",
        ),
        workload=Workload(tokens_in=1, tokens_out=1),
    )


def placed(*pairs):
    return Placement(spans=tuple(None if pair is None else Span(*pair) for pair in pairs))


@pytest.mark.parametrize(
    ("where", "pairs", "rows"),
    [
        ("aa", [(0, 2), (2, 4)], 50),  # 2 blocks of 10 ms
        ("ab", [(0, 2), (2, 4)], 8),  # the way between
        ("abb", [(0, 2), (2, 4), (2, 4)], 16),  # two ways
        ("aab", [(0, 2), (2, 4), (2, 4)], 50),  # nobody needs the slow one
        ("abab", [(0, 2), (0, 2), (2, 4), (2, 4)], 100),  # each site by itself
        # Who takes over within its span has time left: 2 of 3 blocks at 100 rows/s, 50 rows.
        ("aa", [(0, 2), (1, 4)], 50),
        ("aa", [(0, 3), (1, 4)], 100 / 3),
        ("aa", [(1, 4), None], 0),
        ("aa", [(0, 2), (3, 4)], 0),
    ],
)
def test_what_gets_through(where, pairs, rows):
    problem = sites(where)
    found = rows_over_links(problem, placed(*pairs), _rates(problem))
    assert found == pytest.approx(rows)


def _rates(problem):
    """100 rows/s through one block, whatever memory holds."""
    return tuple(
        tuple(100 / count for count in range(1, problem.num_blocks + 1)) for _ in problem.servers
    )


def test_a_servers_own_link_carries_no_more_than_before():
    problem = sites("aa")
    slow = replace(problem.servers[1], network_rows_per_s=20.0)
    problem = replace(problem, servers=(problem.servers[0], slow))
    assert rows_over_links(problem, placed((0, 2), (2, 4)), _rates(problem)) == pytest.approx(20)


@pytest.mark.parametrize("way", ["uplink_bytes_per_s", "downlink_bytes_per_s"])
def test_all_ways_of_a_machine_share_its_own_line(way):
    """Each way alone would pass 8 rows; three go through one machine, whose line passes 10."""
    problem = sites("abbb")
    slow = replace(problem.servers[0], **{way: 10.0})
    problem = replace(problem, servers=(slow, *problem.servers[1:]))
    placement = placed((0, 2), (2, 4), (2, 4), (2, 4))
    assert rows_over_links(problem, placement, _rates(problem)) == pytest.approx(10)
    price = prices(problem, 0, "token")
    assert price.leave[0] - price.arrive[0] == pytest.approx(0.1 if way.startswith("up") else -0.1)


@st.composite
def linked_problems(draw):
    problem = draw(problems(servers_max=4, blocks_max=4, flow="push", clients_max=1))
    count = len(problem.servers)
    rate = st.sampled_from([1.0, 7.0, 40.0, math.inf])
    rows = draw(st.lists(rate, min_size=count * count, max_size=count * count))
    ways = tuple(tuple(rows[count * one : count * (one + 1)]) for one in range(count))
    return replace(problem, links=replace(problem.links, server_bytes_per_s=ways))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_limits_only_take_away_and_the_bound_holds(data):
    problem = data.draw(linked_problems())
    placement = data.draw(placements(problem))
    rates = capped_rates(problem)
    free = replace(problem, links=replace(problem.links, server_bytes_per_s=None))
    linked, unlinked = (rows_over_links(one, placement, rates) for one in (problem, free))
    assert linked <= unlinked * (1 + 1e-6)
    # Taking turns on runs of some blocks gets more through than everybody running all of its own.
    assert unlinked >= rows_through(problem, placement, rates) * (1 - 1e-6)
    assert unlinked <= throughput_bound(problem, rates) * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_servers_that_are_alike_may_be_taken_together(data):
    where = data.draw(st.text("ab", min_size=2, max_size=6))
    problem = sites(where, between=data.draw(st.sampled_from([3.0, 20.0])))
    placement = data.draw(placements(problem))
    ways = problem.links.server_bytes_per_s
    # Nobody sends to itself: with other rates there, nothing changes but that all are different.
    own = tuple(
        tuple(float(1 + one) if one == other else rate for other, rate in enumerate(row))
        for one, row in enumerate(ways)
    )
    other = replace(problem, links=replace(problem.links, server_bytes_per_s=own))
    assert len(set(problem.way_classes)) <= 2
    assert len(set(other.way_classes)) == len(where)
    each, together = (rows_over_links(one, placement, _rates(one)) for one in (other, problem))
    assert together == pytest.approx(each)


@settings(max_examples=15, deadline=None)
@given(linked_problems())
def test_no_plan_for_throughput_gets_less_through_than_flow_alone(problem):
    rates = capped_rates(problem)
    least = 0.0
    with suppress(NoRouteError):
        least = rows_over_links(problem, plan_flow(problem).placement, rates)
    try:
        proposal = propose(problem, "throughput", seed=3, budget=QUICK)
    except NoRouteError:
        assert not least
        return
    placement = proposal.best.placement
    assert not uncovered(problem, placement.spans)
    assert all(free_bytes(problem, placement, one) >= 0 for one, _ in placement.hosted())
    assert proposal.value == pytest.approx(rows_over_links(problem, placement, rates))
    assert least * (1 - 1e-6) <= proposal.value <= proposal.bound * (1 + 1e-6)
    assert proposal == propose(problem, "throughput", seed=3, budget=QUICK)


def test_a_plan_keeps_rows_off_slow_ways_and_says_so():
    rng = random.Random(10)
    problem = sites("abcabcab", blocks=8, between=6.0)
    machines = tuple(
        replace(
            one,
            memory_bytes=rng.choice([22, 33, 44]),
            decode=DecodeTimes(points=((1, rng.choice([0.005, 0.01, 0.02])),)),
        )
        for one in problem.servers
    )
    problem = replace(problem, servers=machines)
    budget = Budget(moves_max=400, limit_s=5.0, clock=lambda: 0.0)  # the solver has its own clock
    proposal = propose(problem, "throughput", budget=budget)
    assert proposal.best.policy.startswith(LINKED)
    blind = max(one.outlook.rows_per_s for one in proposal.tried if one.policy.startswith("flow"))
    assert proposal.value > 1.1 * blind
    said = " ".join(advise(problem, proposal))
    assert f"does not know what ways between servers let through: {blind:.3g} tokens/s by" in said


def test_where_nothing_helps_it_is_said_that_ways_limit():
    problem = sites("ab")
    proposal = propose(problem, "throughput", budget=QUICK)
    assert proposal.value == pytest.approx(8)
    assert any("8 tokens/s get through, 50 would if" in one for one in advise(problem, proposal))


def test_other_goals_pay_for_slow_ways_by_the_row():
    problem = sites("ab", between=8.0)
    chain = (Hop(0, Span(0, 2)), Hop(1, Span(2, 4)))
    free = replace(problem, links=replace(problem.links, server_bytes_per_s=None))
    one, other = (chain_s(prices(each, 0, "token"), chain) for each in (problem, free))
    assert one - other == pytest.approx(1 / 8)
    assert LINKED not in [tried.policy for tried in propose(problem, "latency", budget=QUICK).tried]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"flow": "hub"}, "are for push"),
        ({"server_bytes_per_s": ((1.0, 1.0),)}, "2 servers need as many rows"),
        ({"server_bytes_per_s": ((1.0, 1.0), (0.0, 1.0))}, "must be above 0"),
    ],
)
def test_rates_that_cannot_be(change, said):
    problem = sites("ab")
    with pytest.raises(ConfigError, match=said):
        replace(problem, links=replace(problem.links, **change))
