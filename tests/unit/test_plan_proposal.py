"""Proposals: sound for every problem, the same for a seed, and honest about few servers."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.advice import advise
from shoal.plan.change import change_between
from shoal.plan.outlook import look_ahead
from shoal.plan.placement import Placement, free_bytes, uncovered
from shoal.plan.proposal import propose
from shoal.plan.rates import capped_rates
from shoal.plan.spec import DecodeTimes
from shoal.plan.trying import PRESENT, Budget, merit
from tests.unit.plan_problems import placements, problems, simple

QUICK = Budget(moves_max=100)


def spans(*pairs):
    return tuple(None if pair is None else Span(*pair) for pair in pairs)


def check_sound(problem, proposal):
    """Covers, fits, is no worse than anything else that was tried, nor than the bound."""
    placement = proposal.best.placement
    assert not uncovered(problem, placement.spans)
    assert all(free_bytes(problem, placement, one) >= 0 for one, _ in placement.hosted())
    objective = proposal.objective
    if objective == "pareto":
        points = [(one.outlook.step_s, one.outlook.rows_per_s) for one in proposal.front]
        assert points == sorted(points)
        assert all(a[1] < b[1] for a, b in pairwise(points))
        return
    if proposal.best.policy != PRESENT:
        best = merit(proposal.best.outlook, objective)
        assert all(best <= merit(one.outlook, objective) for one in proposal.tried)
    if objective == "throughput":
        assert proposal.value <= proposal.bound * (1 + 1e-6) or math.isinf(proposal.value)
    elif not math.isinf(proposal.gap):
        assert proposal.value >= proposal.bound * (1 - 1e-6) - 1e-12
    assert 0 <= proposal.gap <= 1 or math.isinf(proposal.gap)


@settings(max_examples=20, deadline=None)
@given(problems(servers_max=4, blocks_max=5), st.sampled_from(["latency", "response"]))
def test_proposals_are_sound_and_the_same_for_a_seed(problem, objective):
    try:
        proposal = propose(problem, objective, seed=3, budget=QUICK)
    except NoRouteError:
        return  # it says so
    check_sound(problem, proposal)
    again = propose(problem, objective, seed=3, budget=QUICK)
    assert again.best.placement == proposal.best.placement
    assert again.value == proposal.value
    assert advise(problem, proposal)


@settings(max_examples=15, deadline=None)
@given(problems(servers_max=3, blocks_max=4), st.sampled_from(["throughput", "pareto"]))
def test_so_are_those_for_many_sessions(problem, objective):
    with suppress(NoRouteError):
        check_sound(problem, propose(problem, objective, budget=QUICK))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_leaving_the_present_placement_has_to_pay(data):
    problem = data.draw(problems(servers_max=3, blocks_max=4))
    present = data.draw(placements(problem))
    try:
        proposal = propose(problem, "latency", present=present, budget=QUICK)
    except NoRouteError:
        return
    assert proposal.change is not None
    if proposal.best.policy == PRESENT:
        assert proposal.best.placement == present
        assert not proposal.change.moves
    elif not uncovered(problem, present.spans):
        now = look_ahead(problem, present, capped_rates(problem))
        if now.unplaced <= proposal.best.outlook.unplaced:
            assert proposal.value < 0.97 * now.step_s + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_changes_end_where_they_should_and_load_only_what_is_new(data):
    problem = data.draw(problems(servers_max=4, blocks_max=5))
    before, after = data.draw(placements(problem)), data.draw(placements(problem))
    change = change_between(problem, before, after)
    now, hosted_before = list(before.spans), set(uncovered(problem, before.spans))
    for move in change.moves:
        assert now[move.server] == move.before
        now[move.server] = move.after
        had = set() if move.before is None else set(range(move.before.start, move.before.end))
        gets = set() if move.after is None else set(range(move.after.start, move.after.end))
        weights = problem.model.weight_bytes
        assert move.load_bytes == sum(weights[block] for block in gets - had)
    assert tuple(now) == after.spans
    if not uncovered(problem, after.spans) and hosted_before:
        assert not change.moves or not change.moves[-1].uncovers


def test_a_change_keeps_blocks_served_where_the_order_allows():
    problem = simple([100, 100, 100], 4)
    before = Placement(spans=spans((0, 2), (2, 4), None))
    after = Placement(spans=spans((2, 4), (0, 2), (0, 2)))
    change = change_between(problem, before, after, [10.0, 20.0, 5.0])
    assert change.moves[0].server == 2
    assert change.load_bytes == 60
    assert change.load_s == pytest.approx(4.0)
    assert change.is_seamless  # the new one first, then each of the others has a stand-in
    alone = change_between(problem, before, Placement(spans=spans((2, 4), (0, 2), None)))
    assert not alone.is_seamless
    assert alone.moves[0].uncovers == (Span(0, 2),)
    assert not alone.moves[1].uncovers


# --- what it says -------------------------------------------------------------------


def test_one_server_that_holds_all_is_said_to_be_faster():
    problem = simple([200, 100, 100], 8, block_s=[0.01, 0.01, 0.01], rtt_s=[0.1] * 3)
    proposal = propose(problem, "latency", budget=QUICK)
    assert proposal.value == pytest.approx(0.1 + 8 * 0.01)
    assert proposal.gap == pytest.approx(0.0, abs=1e-9)
    said = advise(problem, proposal)
    assert said[0].startswith("One server is faster: for one session s takes 180 ms per token")
    assert "split over 3 servers a token takes 380 ms, 2.1 times as long" in said[0]


@pytest.mark.parametrize(
    ("memory", "block_s", "said"),
    [
        ([200, 50], [0.2, 0.01], "Splitting pays: over 2 servers a token takes 860 ms, over 1 "),
        ([200, 50, 50], [0.2, 0.01, 0.01], "2 servers are fastest: for one session s and s take"),
        ([50, 50], [0.01, 0.01], "Only 2 servers together hold the model: 100 ms per token."),
    ],
)
def test_splitting_that_pays_is_said_to(memory, block_s, said):
    problem = simple(memory, 8, block_s=block_s, rtt_s=[0.01] * len(memory))
    assert advise(problem, propose(problem, "latency", budget=QUICK))[0].startswith(said)


def test_a_model_for_one_server_alone():
    problem = simple([1000], 4)
    assert advise(problem, propose(problem, "latency", budget=QUICK))[0].startswith(
        "The model fits into one server"
    )


def test_too_many_requests_are_told():
    problem = simple([60, 60], 8, requests_per_s=1000.0)
    proposal = propose(problem, "response")
    assert math.isinf(proposal.value)
    assert any("are too many" in line for line in advise(problem, proposal))


def test_sessions_without_room_are_told():
    problem = simple([100, 100], 8, sessions=50, cache=2)
    proposal = propose(problem, "latency", budget=QUICK)
    assert proposal.best.outlook.unplaced
    assert any("find no room at once" in line for line in advise(problem, proposal))


def test_a_good_present_placement_stays():
    problem = simple([50, 50], 8, sessions=2)
    present = Placement(spans=spans((0, 4), (4, 8)))
    proposal = propose(problem, "latency", present=present)
    assert proposal.best.policy == PRESENT
    assert any(line.startswith("Stay") for line in advise(problem, proposal))
    torn = Placement(spans=spans((0, 4), (0, 4)))
    moved = propose(problem, "latency", present=torn)
    assert moved.best.policy != PRESENT
    assert moved.present is not None
    assert math.isinf(moved.present.alone_s)


def test_what_cannot_be_is_refused():
    with pytest.raises(NoRouteError, match=r"no placement exists: 8 blocks .* together have 5e-08"):
        propose(simple([20, 30], 8), "latency")
    problem = simple([100, 100], 8)
    with pytest.raises(ConfigError, match="no rule of placement is called 'best'"):
        propose(problem, "latency", policy="best")
    with pytest.raises(ConfigError, match="not a span"):
        propose(problem, "latency", present=Placement(spans=spans((0, 9), None)))


def test_one_rule_alone_is_left_as_it_is():
    problem = simple([100, 50, 100], 8)
    proposal = propose(problem, "latency", policy="whole")
    assert proposal.best.placement.spans == spans((0, 8), None, (0, 8))
    assert [one.policy for one in proposal.tried] == ["whole"]


def test_without_time_one_rule_is_tried_all_the_same():
    ticks = iter(range(10_000))
    budget = Budget(limit_s=0.5, clock=lambda: float(next(ticks)), started_s=0.0)
    proposal = propose(simple([100, 100], 8), "latency", budget=budget)
    assert proposal.best.policy.startswith("whole")
    assert "anneal" in proposal.skipped


def test_memory_that_is_left_makes_replicas():
    problem = simple([100, 100, 40], 8)
    proposal = propose(problem, "latency", budget=QUICK)
    assert min(proposal.best.outlook.replicas) >= 2
    assert all(span is not None for span in proposal.best.placement.spans)


def test_replicas_share_sessions_when_passes_get_slower():
    problem = simple([200, 200], 8, sessions=4)
    twice = DecodeTimes(points=((1, 0.01), (4, 0.04)))
    problem = replace(
        problem, servers=tuple(replace(server, decode=twice) for server in problem.servers)
    )
    placement = Placement(spans=spans((0, 8), (0, 8)))
    outlook = look_ahead(problem, placement, capped_rates(problem))
    assert [use.sessions for use in outlook.servers] == [2, 2]
    assert outlook.step_s == pytest.approx(0.05 + 8 * 0.02)
    assert outlook.tokens_per_s == pytest.approx(4 / 0.21)
