"""The solved rules: equal to brute force and to each other, never worse than the quick ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.bounds import request_bound_s
from shoal.plan.compose import mean_s
from shoal.plan.place import program
from shoal.plan.place.bigm import plan_bigm
from shoal.plan.place.flow import decode_rates, plan_flow, rows_through
from shoal.plan.place.milp import plan_milp
from shoal.plan.place.program import Program
from shoal.plan.placement import Placement, check_placement
from shoal.plan.policies import PLACERS
from shoal.plan.spec import DecodeTimes, Links
from tests.unit.plan_problems import least_mean_s, placements, problems, server, simple, tight


@pytest.mark.parametrize("exits", ["end", "anywhere"])
@given(problem=problems(flow="hub", servers_max=3, blocks_max=3))
@settings(max_examples=15, deadline=None)
def test_the_window_program_finds_the_optimum(exits, problem):
    problem = replace(problem, exits=exits)
    best = least_mean_s(problem)
    if best is None:
        with pytest.raises(NoRouteError, match="none exists"):
            plan_milp(problem)
        return
    plan = plan_milp(problem)
    check_placement(problem, plan.placement)
    assert plan.seconds == pytest.approx(best, abs=1e-9)
    assert plan.bound <= plan.seconds + 1e-9
    assert request_bound_s(problem) <= plan.seconds + 1e-9


@pytest.mark.parametrize(
    ("servers", "blocks", "sessions", "seed"),
    [(2, 3, 2, 0), (3, 4, 2, 1), pytest.param(3, 5, 3, 2, marks=pytest.mark.slow)],
)
def test_the_published_program_agrees(servers, blocks, sessions, seed):
    problem = tight(servers, blocks, sessions, 2.0, seed)
    ours, theirs = plan_milp(problem), plan_bigm(problem)
    assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-6)
    check_placement(problem, theirs.placement)
    assert ours.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_no_quick_rule_beats_the_optimum(seed):
    problem = tight(5, 8, 3, 2.0, seed)
    optimum = plan_milp(problem).seconds
    for name, rule in PLACERS.items():
        try:
            placement = rule(problem, random.Random(seed))
        except NoRouteError:
            continue
        assert optimum <= mean_s(problem, placement) * (1 + 1e-6), name


@pytest.mark.slow
def test_annealing_is_near_the_optimum():
    """Median within 3 %, as in the study of tight memory."""
    gaps = []
    for seed in range(5):
        problem = tight(4, 7, 3, 2.0, seed)
        annealed = mean_s(problem, PLACERS["anneal"](problem, random.Random(seed)))
        gaps.append(annealed / plan_milp(problem).seconds - 1)
    assert sorted(gaps)[2] <= 0.03


def test_leaving_a_span_early_can_only_help():
    problem = tight(5, 8, 4, 2.0, 3)
    early = plan_milp(replace(problem, exits="anywhere"))
    assert early.seconds <= plan_milp(problem).seconds * (1 + 1e-9)


def test_what_the_exact_rules_cannot_plan_is_refused():
    problem = simple([100, 100], 4)
    push = replace(
        problem,
        links=Links(client_rtt_s=((0.1, 0.1),), server_rtt_s=((0.0, 0.1),) * 2, flow="push"),
    )
    for plan in (plan_milp, plan_bigm):
        with pytest.raises(ConfigError, match="hub prices"):
            plan(push)
    uneven = replace(problem, model=replace(problem.model, weight_bytes=(10, 10, 10, 11)))
    with pytest.raises(ConfigError, match="equal blocks"):
        plan_bigm(uneven)
    with pytest.raises(NoRouteError, match="none exists"):
        plan_bigm(simple([5, 5], 4))


def test_no_time_is_said_to_be_no_time():
    with pytest.raises(NoRouteError, match="found none within its limit"):
        plan_milp(tight(8, 16, 6, 1.3, 0), limit_s=0.0)


def test_limited_by_branches_the_same_plan_comes_out_again():
    problem = tight(6, 8, 4, 1.5, 0)
    few, again = (plan_milp(problem, limit_s=None, branches_max=2) for _ in range(2))
    assert few == again
    assert few.gap > 1e-3, "not proven with so few"
    assert few.bound < plan_milp(problem).seconds <= few.seconds * (1 + 1e-9)


# --- throughput ---------------------------------------------------------------


def flow_by_program(problem, placement, rates):
    """The largest flow with a variable for each way: what `rows_through` must equal."""
    lp = Program()
    borders = [{} for _ in range(problem.num_blocks + 1)]
    for one, span in placement.hosted():
        flows = []
        for entry in range(span.start, span.end):
            flow = lp.variable(cost=0.0 if entry else -1.0)
            borders[entry][flow] = 1.0
            borders[span.end][flow] = -1.0
            flows.append(flow)
        lp.row(dict.fromkeys(flows, 1.0), high=rates[one][len(span) - 1])
    for terms in borders[1:-1]:
        if terms:
            lp.row(terms, low=0, high=0)
    return -lp.solve().objective


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_largest_flow_is_the_worst_blocks_sum(data):
    problem = data.draw(problems(servers_max=6, blocks_max=6))
    placement = data.draw(placements(problem))
    speeds = st.integers(1, 50).map(float)
    rates = tuple(
        tuple(data.draw(speeds) for _ in range(problem.num_blocks)) for _ in problem.servers
    )
    if not placement.hosted():
        return
    direct = rows_through(problem, placement, rates)
    assert direct == pytest.approx(flow_by_program(problem, placement, rates), abs=1e-6)


def helix(*counts):
    """A100, L4, T4 for Llama-70B as in our study: blocks at most, rows per second of one."""
    classes = ((6400, 12), (1400, 7), (800, 4))
    return [
        tuple(rate / blocks if blocks <= most else 0.0 for blocks in range(1, 81))
        for (rate, most), count in zip(classes, counts, strict=True)
        for _ in range(count)
    ]


@pytest.mark.slow
def test_small_clusters_are_proven():
    """6 machines, 20 blocks: 560 rows per second of at most 580, proven."""
    rates = tuple(one[:20] for one in helix(1, 2, 3))
    problem = simple([1] * 6, 20)
    plan = plan_flow(problem, rates=rates)
    assert plan.rows_per_s == pytest.approx(560)
    assert plan.bound == pytest.approx(560, rel=1e-3)


def test_the_published_cluster_of_24_machines():
    """Helix' 24 machines, 80 blocks: over 0.9 of the analytic bound, without the solver."""
    plan = plan_flow(simple([1] * 24, 80), rates=tuple(helix(4, 8, 12)), limit_s=0.0)
    assert plan.bound == pytest.approx(580)
    assert plan.rows_per_s >= 0.9 * 580


def test_decode_rates_follow_memory_and_links():
    problem = simple([100], 4, weight=10, cache=5)
    times = DecodeTimes(points=((1, 0.1), (8, 0.1)))
    fast = replace(problem.servers[0], decode=times)
    problem = replace(problem, servers=(fast,))
    # 1 block leaves room for 18 sessions, but 8 is the most that was measured; 4 for 3.
    assert decode_rates(problem)[0] == pytest.approx((80.0, 40.0, 4 / 0.3, 3 / 0.4))
    linked = replace(problem, servers=(replace(fast, link_bytes_per_s=20.0),))
    assert decode_rates(linked)[0] == pytest.approx((20.0, 20.0, 4 / 0.3, 3 / 0.4))
    small = replace(problem, servers=(replace(fast, memory_bytes=29),))
    assert decode_rates(small)[0] == (pytest.approx(30.0), 0.0, 0.0, 0.0)


def test_spare_servers_raise_the_worst_blocks():
    problem = simple([25, 25, 15, 15], 4, weight=10, cache=1)
    placement = plan_flow(problem).placement
    assert all(span is not None for span in placement.spans)
    with pytest.raises(NoRouteError, match="no placement lets any row"):
        plan_flow(simple([25], 4))


def test_many_different_servers_are_left_to_petals_rule():
    rates = tuple(tuple((400 + one) / blocks for blocks in range(1, 41)) for one in range(30))
    plan = plan_flow(simple([1] * 30, 40), rates=rates, limit_s=0.0)
    assert plan.rows_per_s > 0.9 * plan.bound


def test_free_blocks_are_no_trouble():
    problem = replace(simple([100], 2), servers=(server(100, 0.0),))
    assert plan_flow(problem).placement == Placement(spans=(Span(0, 2),))


# --- programs -----------------------------------------------------------------


def test_a_program_is_solved_and_bounded():
    one = Program()
    x, y = one.variable(cost=-3, high=4, integer=True), one.variable(cost=-2)
    one.row({x: 2, y: 1}, high=7)
    solution = one.solve()
    assert solution.values == pytest.approx((0, 7))
    assert (solution.objective, solution.gap) == pytest.approx((-14, 0))
    one.row({y: 1}, low=8)
    assert one.solve().bound == math.inf
    assert one.solve().gap == math.inf


def test_programs_without_variables():
    empty = Program()
    assert empty.solve().objective == 0
    empty.row({}, low=1)
    assert empty.solve().bound == math.inf


def test_programs_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr(program, "VARIABLES_MAX", 10)
    with pytest.raises(ConfigError, match="too large"):
        plan_milp(simple([1000] * 3, 9))
