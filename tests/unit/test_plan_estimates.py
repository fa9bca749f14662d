"""What stands in for measurements: data sheets, positions; splits; load."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.bounds import mean_response_s
from shoal.plan.busy import busiest_rate, busy_response_s
from shoal.plan.compose import Seated, composed, predict
from shoal.plan.cost import Hop, chain_s, mean_prices
from shoal.plan.devices import BATCHES, DEVICES, BlockWork, Device, decode_between, estimate
from shoal.plan.distance import Position, distance_km, fibre_rtt_s
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes
from shoal.plan.splits import SPLITS_MAX, fastest_splits
from shoal.plan.spread import spread
from tests.unit.plan_problems import placements, problems, simple

# --- data sheets ----------------------------------------------------------------------


def test_decoding_reads_weights_until_it_computes():
    device = Device(bytes_per_s=100e9, flops_per_s=1e12)
    times = estimate(device, BlockWork(weight_bytes=60e6, params=60e6))
    # 60 MB at 60 GB/s; 120 million operations at 0.4 T/s.
    assert times.decode.at(1) == pytest.approx(0.0002 + 0.001)
    assert times.decode.at(2) == pytest.approx(0.0002 + 0.001)
    assert times.decode.at(64) == pytest.approx(0.0002 + 64 * 0.0003)
    assert times.prefill_s_per_block_token == pytest.approx(0.0003)


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_every_device_takes_longer_for_more(name):
    small = estimate(DEVICES[name], BlockWork(weight_bytes=1e8, params=5e7))
    large = estimate(DEVICES[name], BlockWork(weight_bytes=2e8, params=1e8, context_bytes=1e6))
    times = [small.decode.at(batch) for batch in BATCHES]
    assert times == sorted(times)
    assert all(small.decode.at(batch) < large.decode.at(batch) for batch in BATCHES)
    assert 0 < small.prefill_s_per_block_token < small.decode.at(1)


def test_batches_between_two_measurements():
    assert decode_between(0.01, 0.001).at(64) == pytest.approx(0.064)
    assert decode_between(0.01, 0.0001).at(64) == pytest.approx(0.01)


# --- positions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "km"),
    [
        ((52.5, 13.4), (48.1, 11.6), 505),  # Berlin, Munich
        ((38.7, -9.1), (52.5, 13.4), 2310),  # Lisbon, Berlin
        ((0, 179.5), (0, -179.5), 111),  # over the date line
        ((90, 0), (-90, 77), 20015),  # pole to pole
    ],
)
def test_distances_are_great_circles(one, other, km):
    assert distance_km(Position(*one), Position(*other)) == pytest.approx(km, rel=0.01)


def test_light_in_fibre_takes_its_time():
    """505 km, 1.5 times as long, there and back at 200 km/ms."""
    berlin, munich = Position(52.5, 13.4), Position(48.1, 11.6)
    assert fibre_rtt_s(berlin, munich) == pytest.approx(0.00757, rel=0.01)
    assert fibre_rtt_s(berlin, berlin) == 0.0
    with pytest.raises(ConfigError, match="is no position"):
        Position(91, 0)
    with pytest.raises(ConfigError, match="is no position"):
        Position(0, math.nan)


# --- splits ---------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(problems(servers_max=4, blocks_max=5))
def test_splits_are_the_fastest_of_all_chains_over_so_many(problem):
    price = mean_prices(problem, "token")
    sizes = [problem.blocks_max(server, 1) for server in range(len(problem.servers))]
    found = {one.num_servers: one for one in fastest_splits(problem)}
    for count in range(1, len(sizes) + 1):
        best = math.inf
        for chosen in combinations(range(len(sizes)), count):
            for order in permutations(chosen):
                for chain in _chains(order, sizes, 0, problem.num_blocks):
                    best = min(best, chain_s(price, chain))
        assert (count in found) == (best < math.inf)
        if count in found:
            assert found[count].seconds == pytest.approx(best)
            assert chain_s(price, found[count].chain) == pytest.approx(best)


def _chains(order, sizes, start, blocks):
    if not order:
        if start == blocks:
            yield ()
        return
    for count in range(1, sizes[order[0]] + 1):
        if start + count <= blocks:
            for rest in _chains(order[1:], sizes, start + count, blocks):
                yield Hop(order[0], Span(start, start + count)), *rest


def test_many_servers_are_chosen_greedily():
    problem = simple([20] * 30, 40, rtt_s=[0.01 * (1 + one % 7) for one in range(30)])
    found = fastest_splits(problem)
    assert [one.num_servers for one in found] == []
    problem = simple([200] * 30, 100, rtt_s=[0.01 * (1 + one % 7) for one in range(30)])
    found = fastest_splits(problem)
    assert [one.num_servers for one in found] == list(range(6, 6 + SPLITS_MAX))
    for one in found:
        assert one.chain[0].span.start == 0
        assert one.chain[-1].span.end == 100
    # The five at 10 ms are among the six, with one at 20 ms.
    assert found[0].seconds == pytest.approx(0.01 * 100 + 5 * 0.01 + 0.02)


# --- load -----------------------------------------------------------------------------


def loaded(points, *, rate, sessions=2):
    problem = simple([200, 200], 8, sessions=sessions, requests_per_s=rate)
    workload = replace(problem.workload, tokens_in=1, tokens_out=11)
    servers = tuple(
        replace(server, decode=DecodeTimes(points=points)) for server in problem.servers
    )
    return replace(problem, servers=servers, workload=workload)


WHOLE = Placement(spans=(Span(0, 8), Span(0, 8)))


def test_flat_times_give_theorem_4_itself():
    problem = loaded(((1, 0.01),), rate=2.0)
    chains = composed(problem, WHOLE)
    assert busy_response_s(problem, chains) == mean_response_s(chains, 2.0)
    assert busiest_rate(problem, chains) == pytest.approx(
        sum(one.seats / one.seconds for one in chains)
    )


def test_passes_that_get_slower_make_answers_slower():
    flat, rising = (loaded(points, rate=2.0) for points in (((1, 0.01),), ((1, 0.01), (16, 0.04))))
    chains = composed(rising, WHOLE)
    low, high = busy_response_s(rising, chains)
    assert busy_response_s(flat, composed(flat, WHOLE))[0] < low <= high < math.inf
    # 10 steps of 8 blocks at 0.04 / 16 s a row: 0.2 s of a server per request, two servers.
    assert busiest_rate(rising, chains) == pytest.approx(10.0)
    assert busy_response_s(loaded(((1, 0.01), (16, 0.04)), rate=10.0), chains)[0] == math.inf


def test_networks_limit_the_rate_of_requests():
    """11 rows of 1 byte each per request, over two lines of 5.5 and 2.2 bytes per second."""
    problem = loaded(((1, 0.01),), rate=2.0)
    quick, slow = problem.servers
    servers = (replace(quick, uplink_bytes_per_s=5.5), replace(slow, downlink_bytes_per_s=2.2))
    problem = replace(problem, servers=servers, model=replace(problem.model, row_bytes=1))
    chains = [Seated(chain=(Hop(server, Span(0, 8)),), seconds=1.0, seats=9) for server in (0, 1)]
    assert busiest_rate(problem, chains) == pytest.approx(0.5 + 0.2)
    assert busy_response_s(problem, chains) == (math.inf, math.inf)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_sessions_sit_alike_whoever_counts_where_times_are_flat(data):
    problem = data.draw(problems(servers_max=4, blocks_max=5))
    placement = data.draw(placements(problem))
    here, there = spread(problem, placement), predict(problem, placement)
    assert here.batches == there.batches
    assert problem.workload.sessions - here.sessions == there.unplaced


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nobody_sits_where_there_is_no_room(data):
    problem = data.draw(problems(servers_max=4, blocks_max=5))
    placement = data.draw(placements(problem))
    rising = tuple(
        replace(server, decode=DecodeTimes(points=((1, 0.01), (3, 0.05))))
        for server in problem.servers
    )
    problem = replace(problem, servers=rising)
    found = spread(problem, placement)
    used = [0] * len(problem.servers)
    for one in (one for own in found.seated for one in own):
        for hop in one.chain:
            used[hop.server] += one.seats * problem.session_bytes(hop.span)
    for server, span in placement.hosted():
        room = problem.servers[server].memory_bytes - problem.weight_bytes(span)
        assert used[server] <= room
    assert found.sessions <= problem.workload.sessions
