"""Bounds: never above what is reached, and the published figures."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.plan.bounds import (
    cgbp_guarantee_s,
    fits_at_all,
    mean_response_s,
    request_bound_s,
    throughput_bound,
)
from shoal.plan.compose import Seated, mean_s
from shoal.plan.cost import Hop, chain_s, prices
from shoal.plan.place.cgbp import cgbp, choose_sessions, sessions_surely
from shoal.plan.placement import uncovered
from shoal.plan.search import Search
from tests.unit.plan_problems import bloom, least_mean_s, problems, simple, tight

MANY = settings(max_examples=30, deadline=None)


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([1.3, 2.0, 4.0]))
@MANY
def test_theorem_2_holds_while_there_are_no_more_sessions_than_planned(seed, sessions, slack):
    problem = tight(8, 12, sessions, slack, seed)
    placement = cgbp(problem, sessions)
    bound = cgbp_guarantee_s(problem, sessions)
    if uncovered(problem, placement.spans):
        assert math.isinf(bound)
        return
    # Every session can take the shortest chain: each server has room for all of them.
    chain = Search(problem, placement, prices(problem, 0, "token")).cheapest()
    assert chain is not None
    assert chain.seconds <= bound * (1 + 1e-9)
    assert mean_s(problem, placement) <= bound * (1 + 1e-9)


@given(problems(servers_max=3, blocks_max=4, flow="hub"))
@settings(max_examples=25, deadline=None)
def test_no_placement_beats_the_bound_of_a_single_request(problem):
    best = least_mean_s(problem)
    if best is None:
        return
    assert request_bound_s(problem) <= best * (1 + 1e-9)


@given(problems(servers_max=3, blocks_max=4, flow="push", clients_max=1))
@settings(max_examples=25, deadline=None)
def test_nor_with_push(problem):
    best = least_mean_s(problem)
    if best is None:
        return
    assert request_bound_s(problem) <= best * (1 + 1e-9)


def test_the_bound_of_a_single_request_is_reached_when_servers_are_alike():
    problem = simple([46, 46, 46], 12, cache=1, block_s=[0.01] * 3, rtt_s=[0.1, 0.2, 0.4])
    assert request_bound_s(problem) == pytest.approx(0.7 + 0.12)
    assert math.isinf(request_bound_s(simple([46, 46], 12)))


def seated(seconds, seats):
    return Seated(chain=(Hop(0, Span(0, 1)),), seconds=seconds, seats=seats)


@pytest.mark.parametrize(("places", "rate"), [(1, 0.5), (3, 2.0), (10, 9.5), (400, 399.0)])
def test_theorem_4_is_erlang_c_for_equal_chains(places, rate):
    low, high = mean_response_s([seated(1.0, places)], rate)
    term, total = 1.0, 1.0  # Poisson terms, rebuilt from the front each time.
    for count in range(1, places):
        term *= rate / count
        total += term
    last = term * rate / places * places / (places - rate)
    waiting = last / (total + last)
    assert low == high == pytest.approx(1.0 + waiting / (places - rate))


def test_theorem_4_of_two_chains_by_hand():
    """Rates 1 and 1/2, one place each, arrivals 1/2: a birth-death chain on paper."""
    chains = [seated(2.0, 1), seated(1.0, 1)]

    def mean(first: float) -> float:
        one, two = 0.5 / first, 0.5 / first * 0.5 / 1.5
        ratio = 0.5 / 1.5
        weights = 1 + one + two / (1 - ratio)
        jobs = one + two * (2 / (1 - ratio) + ratio / (1 - ratio) ** 2)
        return jobs / weights / 0.5

    assert mean_response_s(chains, 0.5) == pytest.approx((mean(1.0), mean(0.5)))


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 200)), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
)
@MANY
def test_theorem_4_is_ordered_and_above_the_fastest_chain(rows, busy):
    chains = [seated(seconds, seats) for seconds, seats in rows]
    capacity = sum(one.seats / one.seconds for one in chains)
    low, high = mean_response_s(chains, busy * capacity)
    assert low <= high * (1 + 1e-9)
    assert low >= min(one.seconds for one in chains) * (1 - 1e-9)
    assert mean_response_s(chains, capacity * 1.01) == (math.inf, math.inf)


def test_jffc_lies_between_the_bounds_of_theorem_4():
    """Poisson arrivals, exponential sizes, join the fastest free chain, one queue."""
    rng = random.Random(4)
    chains = [seated(1.0, 2), seated(2.0, 3), seated(5.0, 4)]
    rate = 0.7 * sum(one.seats / one.seconds for one in chains)
    speeds = [one.seconds for one in chains for _ in range(one.seats)]
    free, ends, queue = sorted(speeds), [], []
    now, total, done, jobs = 0.0, 0.0, 0, 30_000
    arrival = rng.expovariate(rate)
    while done < jobs:
        if not ends or arrival < min(ends)[0]:
            now, arrival = arrival, arrival + rng.expovariate(rate)
            queue.append(now)
        else:
            ends.sort()
            now, came, speed = ends.pop(0)
            free = sorted([*free, speed])
            total, done = total + now - came, done + 1
        while queue and free:
            speed = free.pop(0)
            ends.append((now + rng.expovariate(1 / speed), queue.pop(0), speed))
    low, high = mean_response_s(chains, rate)
    assert low * 0.97 <= total / jobs <= high * 1.03


def test_a_rate_and_chains_are_needed():
    with pytest.raises(ValueError, match="rate above 0"):
        mean_response_s([], 1.0)
    with pytest.raises(ValueError, match="rate above 0"):
        mean_response_s([seated(1.0, 1)], 0.0)
    assert mean_response_s([seated(0.0, 1), seated(1.0, 1)], 3.0) == (0.0, 1.0)


def test_the_bound_of_throughput_is_all_work_over_all_blocks():
    """Helix' classes as in our study: 2 A100, 3 L4, 5 T4 and 40 blocks."""
    problem = simple([1] * 10, 40)
    classes = [(6400, 12)] * 2 + [(1400, 7)] * 3 + [(800, 4)] * 5
    rates = [[rate / count for count in range(1, most + 1)] for rate, most in classes]
    assert throughput_bound(problem, rates) == pytest.approx(525)


@pytest.mark.parametrize(("sessions", "fits"), [(1, True), (3, True), (4, False)])
def test_memory_says_whether_it_can_fit_at_all(sessions, fits):
    assert fits_at_all(simple([26, 26], 4, weight=10, cache=1), sessions) is fits


@pytest.mark.parametrize(
    ("rate", "tokens_out", "blocks", "low", "high"),
    [(0.5, 128, 53, 33, 37), (0.5, 64, 60, 18, 21), (0.1, 128, 61, 7, 10)],
)
def test_the_published_design_number_and_blocks(rate, tokens_out, blocks, low, high):
    """BPRR's nine servers: R and the blocks of an A100 as their simulator has them."""
    problem = bloom(2, 7, [0.01] * 9, rate=rate, tokens_out=tokens_out)
    number = choose_sessions(problem)
    assert low <= number <= high
    assert problem.blocks_max(0, number) == blocks
    assert problem.blocks_max(2, number) == 4


def test_the_published_guarantee():
    """0.46 s per token on AboveNet with nine servers, 128 tokens, 0.5 requests per second."""
    problem = bloom(2, 7, [0.01] * 9, rate=0.5, tokens_out=128)
    number = choose_sessions(problem)
    assert cgbp_guarantee_s(problem, number) == pytest.approx(0.46, abs=0.02)
    placement = cgbp(problem, number)
    found = Search(problem, placement, prices(problem, 0, "token")).cheapest()
    assert found is not None
    assert chain_s(prices(problem, 0, "token"), found.chain) <= 0.46


@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 6.0]))
@MANY
def test_what_memory_surely_seats_cgbp_places(seed, slack):
    problem = tight(6, 8, 4, slack, seed)
    surely = sessions_surely(problem)
    for number in range(1, min(surely, 12) + 1):
        assert not uncovered(problem, cgbp(problem, number).spans)
