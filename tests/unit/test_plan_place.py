"""Each rule of placement does what its source says, and they stand in the order they should."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.compose import mean_s, scorer
from shoal.plan.memory import CacheShape, gqa
from shoal.plan.place.anneal import place_anneal
from shoal.plan.place.cgbp import cgbp, place_cgbp, place_cgbp_sweep
from shoal.plan.place.gbpcr import gbpcr, place_gbpcr
from shoal.plan.place.latency import (
    GAIN_MIN,
    Goal,
    SwitchCost,
    candidates,
    choose_join,
    choose_move,
    place_latency,
    settle,
)
from shoal.plan.place.petals import petals_blocks, place_petals, place_petals_joins
from shoal.plan.place.waterfill import fill, place_waterfill
from shoal.plan.place.whole import place_whole
from shoal.plan.placement import Placement, uncovered
from shoal.plan.spec import Links, uniform_model
from tests.unit.plan_problems import bloom, problems, simple, tight

RNG = random.Random(0)


def spans(*pairs):
    return tuple(None if pair is None else Span(*pair) for pair in pairs)


# --- Petals -------------------------------------------------------------------


def test_petals_hosts_the_published_numbers_of_blocks():
    """53 on an A100 and 4 on its seventh, whatever the workload (BPRR's simulator)."""
    problem = bloom(1, 1, [0.0, 0.0], rate=0.5, tokens_out=128)
    large, small = problem.servers
    problem = replace(problem, servers=(replace(large, memory_bytes=84_973_000_000), small))
    assert [petals_blocks(problem, one) for one in (0, 1)] == [53, 4]
    longer = replace(problem, workload=replace(problem.workload, tokens_out=512, sessions=9))
    assert [petals_blocks(longer, one) for one in (0, 1)] == [53, 4]


def test_petals_keeps_four_times_the_cache_where_heads_share_it():
    problem = simple([10**12], 100)
    many = uniform_model(100, 10**9, gqa(8, 128), hidden_size=1024)
    few = uniform_model(100, 10**9, gqa(4, 128), hidden_size=1024)
    spare = (2 << 30) * 1024 // 14336
    for model, tokens in ((many, 4096), (few, 16384)):
        server = replace(problem.servers[0], memory_bytes=spare + 50 * 10**9)
        sized = replace(problem, model=model, servers=(server,))
        each = 10**9 + model.caches[0].session_bytes(tokens)
        assert petals_blocks(sized, 0) == 50 * 10**9 // each


def test_petals_cache_is_all_that_its_sessions_get():
    problem = bloom(2, 7, [0.01] * 9, rate=0.5, tokens_out=128)
    placement = place_petals_joins(problem, random.Random(1))
    assert placement.cache_bytes is not None
    for server, span in placement.hosted():
        assert placement.cache_bytes[server] == len(span) * 4096 * 57344
    settled = place_petals(problem, random.Random(1))
    assert [span and len(span) for span in settled.spans] == [
        span and len(span) for span in placement.spans
    ]


# --- CG-BP --------------------------------------------------------------------


def test_cgbp_puts_fast_servers_first_side_by_side():
    problem = simple([33, 33, 55], 6, cache=1, block_s=[0.02, 0.01, 0.01], rtt_s=[0.1] * 3)
    # The third is fastest per block (its round trip is spread over 5), then the second.
    assert cgbp(problem, 1).spans == spans((0, 3), (3, 6), (0, 5))


def test_cgbp_then_goes_where_fewest_sessions_fit():
    problem = simple([66, 22, 22], 6, cache=1)
    assert cgbp(problem, 1).spans == spans((0, 6), (0, 2), (2, 4))


def test_cgbp_has_no_constant_ratio():
    """BPRR's example: L^2 servers with memory for L + 1 blocks, cache as large as a block."""
    blocks = 4
    problem = simple([5 * 10] * 16, blocks, weight=10, cache=10, rtt_s=[1.0] * 16, sessions=4)
    greedy = mean_s(problem, place_cgbp(problem, RNG))
    assert greedy == pytest.approx(blocks * (1.0 + 0.01))
    problem = replace(problem, servers=(replace(problem.servers[0], memory_bytes=80),) * 16)
    best = mean_s(problem, place_anneal(problem, RNG, moves=0))
    assert best == pytest.approx(1.0 + blocks * 0.01)


@given(st.integers(0, 10**6), st.sampled_from([1.3, 2.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_annealing_is_no_worse_than_the_sweep_and_that_no_worse_than_cgbp(seed, slack):
    problem = tight(6, 8, 4, slack, seed)
    score = scorer(problem)
    plain = score(cgbp(problem, 4))
    try:
        swept = place_cgbp_sweep(problem, RNG)
        annealed = place_anneal(problem, random.Random(seed), moves=100)
    except NoRouteError:
        assert plain.uncovered
        return
    assert score(annealed) <= score(swept) <= plain


def test_the_sweep_thins_out_many_numbers():
    problem = simple([10**6] * 3, 4, cache=1, sessions=500)
    assert uncovered(problem, place_cgbp_sweep(problem, RNG).spans) == []


# --- chains -------------------------------------------------------------------


def test_gbpcr_lays_chains_end_to_end():
    # One token is all prefill, and that takes nothing but round trips here.
    problem = simple([33, 33, 44, 22, 44], 6, cache=1)
    assert gbpcr(problem, 1).spans == spans((0, 3), (3, 6), (0, 4), (0, 2), (2, 6))


def test_gbpcr_stops_when_the_chains_do():
    problem = simple([66] * 4, 6, cache=1, rtt_s=[0.04] * 4, block_s=[0.01] * 4)
    # A chain takes 0.04 s: 25 requests per second, or 17.5 so that it is 70 % busy.
    for rate, chains in ((17.4, 1), (17.6, 2), (52.4, 3)):
        placed = gbpcr(problem, 1, requests_per_s=rate)
        assert len(placed.hosted()) == chains


def test_gbpcr_reserves_more_when_more_is_asked():
    few = tight(10, 8, 2, 6.0, 1)
    slow = replace(few, workload=replace(few.workload, requests_per_s=0.1))
    busy = replace(few, workload=replace(few.workload, requests_per_s=200.0))
    for problem in (slow, busy):
        assert uncovered(problem, place_gbpcr(problem, RNG).spans) == []
    assert sum(len(span) for _, span in place_gbpcr(busy, RNG).hosted()) <= sum(
        len(span) for _, span in place_gbpcr(slow, RNG).hosted()
    )
    fixed = place_gbpcr(few, RNG, reservation=2)
    assert fixed == gbpcr(few, 2)
    with pytest.raises(NoRouteError):
        place_gbpcr(few, RNG, reservation=10**9)


def test_whole_models_where_they_fit():
    problem = simple([44, 43, 100], 4, cache=1)
    assert place_whole(problem, RNG).spans == spans((0, 4), None, (0, 4))
    with pytest.raises(NoRouteError, match=r"need 4\.4e-08 GB, the largest server has 4\.3e-08"):
        place_whole(simple([43, 43], 4, cache=1), RNG)


@pytest.mark.parametrize(
    ("sizes", "speeds", "blocks", "counts"),
    [
        ([10, 10], [1, 1], 10, [5, 5]),
        ([10, 10], [3, 1], 8, [6, 2]),
        ([4, 10], [3, 1], 10, [4, 6]),
        ([10, 10, 10], [1, 1, 1], 10, [4, 3, 3]),
        ([3, 3, 4], [1, 9, 1], 10, [3, 3, 4]),
        ([1, 1, 10], [5, 5, 1], 3, [1, 1, 1]),
    ],
)
def test_water_fills_by_speed_up_to_the_size(sizes, speeds, blocks, counts):
    assert fill(sizes, speeds, blocks) == counts


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0.1, 9)), min_size=1, max_size=6),
    st.data(),
)
def test_water_fills_exactly(rows, data):
    sizes, speeds = [size for size, _ in rows], [speed for _, speed in rows]
    blocks = data.draw(st.integers(0, sum(sizes)))
    counts = fill(sizes, speeds, blocks)
    assert sum(counts) == blocks
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_water_makes_as_many_chains_as_pay():
    problem = simple([22] * 4, 4, cache=1, sessions=2)
    assert sorted(place_waterfill(problem, RNG).hosted()) == [
        (0, Span(0, 2)),
        (1, Span(0, 2)),
        (2, Span(2, 4)),
        (3, Span(2, 4)),
    ]
    alone = place_waterfill(problem, RNG, chains=1)
    assert len({span for _, span in alone.hosted()}) >= 2
    with pytest.raises(NoRouteError):
        place_waterfill(problem, RNG, chains=3)


# --- latency ------------------------------------------------------------------


def test_candidates_meet_the_ends_of_others():
    problem = simple([100, 100], 10)
    placement = Placement(spans=spans((2, 5), None))
    assert [one.start for one in candidates(problem, placement, 2)] == [0, 2, 3, 5, 8]


def test_a_joiner_covers_first_and_shortens_then():
    problem = simple([100] * 3, 6, block_s=[0.05, 0.05, 0.01])
    goal = Goal(score=scorer(problem))
    assert choose_join(goal, Placement(spans=spans((0, 4), None, None)), 2, 2) == Span(4, 6)
    covered = Placement(spans=spans((0, 4), (4, 6), None))
    # A slow hop of two blocks is replaced whole; cutting into the other adds a hop.
    assert choose_join(goal, covered, 2, 2) == Span(4, 6)


def test_a_server_moves_where_it_shortens_chains_and_only_if_it_pays():
    problem = simple([100] * 4, 6, block_s=[0.05, 0.05, 0.05, 0.01], rtt_s=[0.02] * 4)
    goal = Goal(score=scorer(problem))
    placement = Placement(spans=spans((0, 3), (3, 6), (0, 3), (1, 4)))
    target = choose_move(goal, placement, 3)
    assert target in (Span(0, 3), Span(3, 6))
    assert goal(placement.moved(3, target)) < goal(placement)
    dear = SwitchCost(reload_s=600.0, sessions_now=5.0, sessions_per_s=1.0, horizon_s=60.0)
    assert choose_move(goal, placement, 3, dear) is None
    cheap = replace(dear, reload_s=1.0)
    assert choose_move(goal, placement, 3, cheap) == target
    assert choose_move(goal, placement.moved(3, None), 3) is None


def test_the_only_holder_stays():
    problem = simple([100] * 2, 6, block_s=[0.05, 0.01])
    goal = Goal(score=scorer(problem))
    assert choose_move(goal, Placement(spans=spans((0, 3), (3, 6))), 1) is None


def test_danger_counts():
    problem = simple([100] * 3, 6)
    placement = Placement(spans=spans((0, 3), (3, 6), (3, 6)))
    safe = Goal(score=scorer(problem), danger_s=0.5)
    assert safe(placement).seconds == pytest.approx(
        Goal(score=scorer(problem))(placement).seconds + 3 * 0.5
    )


@given(problems(flow="push", servers_max=5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_best_responses_end_and_never_lower_the_goal(problem, seed):
    goal = Goal(score=scorer(problem))
    rng = random.Random(seed)
    placement = Placement(spans=(None,) * len(problem.servers))
    for server in range(len(problem.servers)):
        size = problem.blocks_max(server, 1)
        if size:
            start = rng.randint(0, problem.num_blocks - size)
            placement = placement.moved(server, Span(start, start + size))
    order = list(range(len(problem.servers)))
    settled = settle(goal, placement, order)
    assert goal(settled) <= goal(placement)
    for server in order:
        target = choose_move(goal, settled, server)
        if target is not None:  # Only the limit of rounds may have stopped it.
            before, after = goal(settled), goal(settled.moved(server, target))
            assert after[:2] < before[:2] or after.seconds < before.seconds * (1 - GAIN_MIN)


@given(problems(servers_max=5))
@settings(max_examples=25, deadline=None)
def test_placing_for_latency_covers_what_cgbp_covers(problem):
    covers = not uncovered(problem, cgbp(problem, problem.workload.sessions).spans)
    if covers:
        assert uncovered(problem, place_latency(problem, RNG).spans) == []


# --- annealing ----------------------------------------------------------------


def test_annealing_goes_on_from_a_given_placement():
    problem = simple([66, 66, 66], 6, cache=1, rtt_s=[0.1, 0.1, 0.3])
    bad = Placement(spans=spans((0, 3), (1, 4), (3, 6)))
    better = place_anneal(problem, random.Random(1), start=bad, moves=400)
    assert scorer(problem)(better) < scorer(problem)(bad)
    assert place_anneal(problem, random.Random(1), start=bad, moves=0) == bad


def test_annealing_with_push_prices_puts_neighbours_side_by_side():
    """Two sites: chains within one are faster than across."""
    near, far = 0.001, 0.2
    rows = tuple(tuple(near if (a < 2) == (b < 2) else far for b in range(4)) for a in range(4))
    problem = simple([33, 33, 33, 33], 6, cache=1)
    links = Links(client_rtt_s=((0.02,) * 4,), server_rtt_s=rows, flow="push")
    problem = replace(problem, links=links)
    placement = place_anneal(problem, random.Random(2), moves=500)
    halves = {placement.spans[0], placement.spans[1]}, {placement.spans[2], placement.spans[3]}
    assert {Span(0, 3), Span(3, 6)} in halves


def test_caches_without_memory_are_no_trouble():
    problem = simple([66, 66], 6, cache=0, sessions=3)
    free = replace(problem, model=uniform_model(6, 10, CacheShape(values_per_token=0)))
    for rule in (place_cgbp, place_gbpcr, place_waterfill, place_latency, place_anneal):
        assert uncovered(free, rule(free, RNG).spans) == []
