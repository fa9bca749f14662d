"""Petals' rules: joining where it is worst, moving only when it pays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.petals import (
    BALANCE_QUALITY,
    Hosting,
    block_throughputs,
    choose_move,
    choose_span,
    server_throughput,
)


def hosting(start, end, throughput):
    return Hosting(span=Span(start, end), throughput=throughput)


@pytest.mark.parametrize(
    ("throughputs", "num_blocks", "expected"),
    [
        ([0, 0, 0, 0], 2, Span(0, 2)),
        ([5, 5, 0, 0], 2, Span(2, 4)),
        ([5, 0, 5, 5], 2, Span(0, 2)),
        ([5, 0, 4, 5], 2, Span(1, 3)),
        ([5, 1, 5, 1, 2], 2, Span(3, 5)),
        ([1, 2, 3], 3, Span(0, 3)),
        ([3, 2, 1], 1, Span(2, 3)),
    ],
)
def test_a_server_joins_where_it_is_worst(throughputs, num_blocks, expected):
    assert choose_span(throughputs, num_blocks) == expected


@pytest.mark.parametrize("num_blocks", [0, 5, -1])
def test_a_server_hosts_between_one_and_all_blocks(num_blocks):
    with pytest.raises(ConfigError, match="1 to 4 blocks"):
        choose_span([0.0] * 4, num_blocks)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.data())
@settings(max_examples=50)
def test_the_window_is_the_least_by_its_sorted_values(throughputs, data):
    num_blocks = data.draw(st.integers(1, len(throughputs)))
    span = choose_span(throughputs, num_blocks)
    assert len(span) == num_blocks
    assert span.end <= len(throughputs)
    mine = sorted(throughputs[span.start : span.end])
    for start in range(len(throughputs) - num_blocks + 1):
        other = sorted(throughputs[start : start + num_blocks])
        assert mine < other or (mine == other and span.start <= start)


def test_throughput_is_that_of_half_the_span_or_of_the_network():
    assert server_throughput(1000.0, 9) == 200.0
    assert server_throughput(1000.0, 9, 150.0) == 150.0
    assert server_throughput(7.0, 1) == 7.0
    with pytest.raises(ConfigError):
        server_throughput(1000.0, 0)


def test_throughputs_add_up():
    hostings = [hosting(0, 2, 1.0), hosting(1, 3, 2.0)]
    assert block_throughputs(hostings, 4) == [1.0, 3.0, 2.0, 0.0]
    with pytest.raises(ConfigError, match=r"\[1,3\)"):
        block_throughputs(hostings, 2)
    with pytest.raises(ConfigError, match="number of rows"):
        hosting(0, 1, float("nan"))
    with pytest.raises(ConfigError, match="number of rows"):
        hosting(0, 1, float("inf"))
    assert server_throughput(float("inf"), 3) < float("inf")


def test_who_alone_holds_a_block_stays():
    hostings = [hosting(0, 2, 1.0), hosting(2, 4, 1.0), hosting(2, 4, 9.0)]
    assert choose_move(hostings, 0, 4, random.Random(0)) is None


def test_the_third_of_three_moves_to_the_weak_half():
    hostings = [hosting(0, 2, 1.0), hosting(2, 4, 5.0), hosting(2, 4, 5.0)]
    assert choose_move(hostings, 2, 4, random.Random(0)) == Span(0, 2)


def test_who_is_in_the_best_place_stays():
    hostings = [hosting(0, 2, 5.0), hosting(2, 4, 5.0), hosting(0, 2, 1.0)]
    assert choose_move(hostings, 0, 4, random.Random(0)) is None


def test_a_small_gain_is_not_worth_a_move():
    hostings = [hosting(0, 2, 4.0), hosting(2, 4, 5.0), hosting(2, 4, 1.0)]
    assert choose_move(hostings, 2, 4, random.Random(0)) is None
    assert choose_move(hostings, 2, 4, random.Random(0), quality=0.9) == Span(0, 2)


def test_a_broken_swarm_is_joined_up():
    hostings = [hosting(0, 2, 1.0), hosting(0, 2, 1.0)]
    assert choose_move(hostings, 1, 4, random.Random(0)) == Span(2, 4)


def test_a_quality_above_one_always_moves():
    hostings = [hosting(0, 2, 5.0), hosting(0, 2, 5.0)]
    assert choose_move(hostings, 0, 2, random.Random(0), quality=1.1) == Span(0, 2)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[Hosting], int]:
    num_blocks = draw(st.integers(1, 8))
    found = []
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        found.append(hosting(start, end, draw(st.sampled_from([0.5, 1.0, 2.0, 7.0]))))
    return found, num_blocks


@given(swarms(), st.data())
@settings(max_examples=50)
def test_a_move_keeps_the_span_inside_and_uncovers_nothing(swarm, data):
    hostings, num_blocks = swarm
    mine = data.draw(st.integers(0, len(hostings) - 1))
    target = choose_move(hostings, mine, num_blocks, random.Random(1))
    if target is None:
        return
    own = hostings[mine]
    assert target != own.span
    assert len(target) == len(own.span)
    assert target.end <= num_blocks
    moved = [*hostings[:mine], hosting(target.start, target.end, own.throughput)]
    moved += hostings[mine + 1 :]
    if min(block_throughputs(hostings, num_blocks)) > 0:
        assert min(block_throughputs(moved, num_blocks)) > 0


@given(swarms(), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_rebalancing_one_by_one_ends_and_never_lowers_the_worst_block(swarm, seed):
    """The published margin makes it end: what is promised grows, what was there stays."""
    hostings, num_blocks = list(swarm[0]), swarm[1]
    rng = random.Random(seed)
    start = min(block_throughputs(hostings, num_blocks))
    for _ in range(200):
        moves = [
            (index, target)
            for index in range(len(hostings))
            if (target := choose_move(hostings, index, num_blocks, rng, quality=BALANCE_QUALITY))
        ]
        if not moves:
            break
        index, target = moves[0]
        hostings[index] = hosting(target.start, target.end, hostings[index].throughput)
    else:
        pytest.fail("still moving after 200 moves")
    assert min(block_throughputs(hostings, num_blocks)) >= start * 0.999
