"""What problems may look like, and the errors for those that may not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.memory import gqa
from shoal.plan.placement import (
    Placement,
    check_placement,
    covering,
    free_bytes,
    replicas,
    seats,
)
from shoal.plan.spec import DecodeTimes, Links, ModelSpec, Workload
from tests.unit.plan_problems import server, simple


@pytest.mark.parametrize(
    ("batch", "seconds"), [(0.5, 2.0), (1, 2.0), (3, 3.0), (5, 4.0), (9, 12.0), (13, 20.0)]
)
def test_decode_times_are_straight_lines_between_measurements(batch, seconds):
    times = DecodeTimes(points=((1, 2.0), (5, 4.0), (9, 12.0)))
    assert times.at(batch) == seconds


def test_decode_times_never_fall_beyond_what_was_measured():
    assert DecodeTimes(points=((1, 2.0), (5, 1.0))).at(100) == 1.0
    assert DecodeTimes(points=((4, 2.0),)).at(100) == 2.0


@pytest.mark.parametrize(
    "points", [(), ((0, 1.0),), ((2, 1.0), (2, 1.0)), ((1, -1.0),), ((1, math.nan),)]
)
def test_impossible_decode_times_are_refused(points):
    with pytest.raises(ConfigError, match="decode times"):
        DecodeTimes(points=points)


def test_rows_per_second_come_from_the_best_that_is_known():
    one = server(1, 0.1)
    assert one.rows_per_s == 10
    assert replace(one, decode=DecodeTimes(points=((1, 0.1), (4, 0.2)))).rows_per_s == 20
    assert replace(one, decode=DecodeTimes(points=((1, 0.0),))).rows_per_s == math.inf
    assert replace(one, prefill_s_per_block_token=0.01).rows_per_s == 100
    assert replace(one, forward_rows_per_s=7.0).rows_per_s == 7
    assert replace(one, prefill_s_per_block=1.0, prefill_s_per_block_token=0.5).prefill_s(4) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": -1},
        {"prefill_s_per_block": -1.0},
        {"link_bytes_per_s": 0.0},
        {"network_rows_per_s": math.nan},
    ],
)
def test_impossible_servers_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="s: "):
        replace(server(1), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens_in": 0}, {"tokens_out": 0}, {"sessions": 0}, {"requests_per_s": -1.0}],
)
def test_impossible_workloads_are_refused(wrong):
    with pytest.raises(ConfigError):
        Workload(**({"tokens_in": 1, "tokens_out": 1} | wrong))


@pytest.mark.parametrize(
    "wrong",
    [{"weight_bytes": ()}, {"weight_bytes": (1,)}, {"weight_bytes": (1, 0)}, {"row_bytes": 0}],
)
def test_impossible_models_are_refused(wrong):
    right = {"hidden_size": 1, "weight_bytes": (1, 1), "caches": (gqa(1, 1),) * 2, "row_bytes": 1}
    with pytest.raises(ConfigError):
        ModelSpec(**(right | wrong))


@pytest.mark.parametrize(
    ("links", "text"),
    [
        (Links(client_rtt_s=()), "one client"),
        (Links(client_rtt_s=((0.1,),)), "2 numbers"),
        (Links(client_rtt_s=((0.1, -1.0),)), "from 0 s"),
        (Links(client_rtt_s=((0.1, math.nan),)), "from 0 s"),
        (Links(client_rtt_s=((0.1, 0.1),), flow="push"), "server_rtt_s"),
        (Links(client_rtt_s=((0.1, 0.1),), server_rtt_s=((0.0, 0.0),)), "2 servers"),
    ],
)
def test_links_must_fit_the_servers(links, text):
    with pytest.raises(ConfigError, match=text):
        replace(simple([100, 100], 4), links=links)


def test_what_a_placement_leaves_free():
    problem = simple([100, 30, 5], 4, weight=10, cache=2)
    placement = Placement(spans=(Span(0, 4), Span(2, 4), None))
    assert [free_bytes(problem, placement, one) for one in range(3)] == [60, 10, 0]
    assert [seats(problem, placement, one) for one in range(3)] == [7, 2, 0]
    capped = replace(placement, cache_bytes=(16, 99, 0))
    assert [seats(problem, capped, one) for one in range(3)] == [2, 2, 0]
    assert replicas(problem, placement) == [1, 1, 2, 2]
    assert placement.hosted() == [(0, Span(0, 4)), (1, Span(2, 4))]
    free = simple([100], 4, cache=0)
    assert seats(free, Placement(spans=(Span(0, 4),)), 0) > 10**6


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ((Span(0, 4),), "1 servers for 2"),
        ((Span(0, 5), None), r"s: \[0,5\)"),
        ((Span(1, 1), None), r"s: \[1,1\)"),
        ((None, Span(0, 4)), "don't fit"),
    ],
)
def test_placements_that_cannot_be_are_refused(spans, text):
    problem = simple([100, 30], 4)
    with pytest.raises(ConfigError, match=text):
        check_placement(problem, Placement(spans=spans))
    check_placement(problem, Placement(spans=(Span(0, 4), Span(1, 3))))


def test_the_error_of_a_placement_with_holes_tells_the_memory():
    problem = simple([10**9], 4, weight=10**9)
    with pytest.raises(Exception, match=r"\[1,4\).*1 GB.*4 GB") as caught:
        covering(problem, Placement(spans=(Span(0, 1),)))
    assert caught.value.missing == ((1, 4),)
