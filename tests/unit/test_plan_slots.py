"""Slots of a ring: formulas, choices and who leaves when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.plan.slots import (
    Gate,
    RingTimes,
    Slots,
    choose_chunk_rows,
    choose_slots,
    departing,
    moved_times,
    ring_times,
    rising,
    samples_at_once,
    slots_of,
)
from shoal.plan.spec import DecodeTimes

NOTHING = DecodeTimes(points=((1, 0.0),))


def line(alone_s: float, row_s: float) -> DecodeTimes:
    return DecodeTimes(points=((1, alone_s + row_s), (100, alone_s + 100 * row_s)))


def ring(*alone_s: float, row_s: float = 0.0, hops_s: float = 0.0) -> RingTimes:
    stages = tuple(line(one, row_s) for one in alone_s)
    return RingTimes(stages=stages, hops=DecodeTimes(points=((1, hops_s),)))


@pytest.mark.parametrize(
    ("times", "samples", "count", "speed"),
    [
        (ring(1.0), 4, 1, 4.0),  # one node: all samples in one batch
        (ring(1.0, 1.0), 2, 2, 2 / 2),  # rows cost nothing: a batch is as good as a pipeline
        (ring(1.0, 1.0), 1, 1, 1 / 2),
        (ring(0.0, 0.0, row_s=1.0), 4, 2, 1.0),  # only rows cost: both stages must work
        (ring(1.0, 1.0, row_s=0.1, hops_s=2.0), 12, 3, None),  # long ways are filled
    ],
)
def test_the_number_of_slots(times, samples, count, speed):
    chosen = choose_slots(times, samples)
    if speed is not None:
        assert chosen.tokens_per_s == pytest.approx(speed)
    if times.stages[0].at(2) > times.stages[0].at(1):
        assert chosen.count == count
    alone = [slots_of(times, samples, one).tokens_per_s for one in range(1, samples + 1)]
    assert max(alone) <= chosen.tokens_per_s * 1.0101**samples


def test_long_ways_need_as_many_slots_as_the_formula_says():
    times = ring(0.010, 0.010, 0.010, row_s=0.001, hops_s=0.090)
    assert choose_slots(times, 100).count >= 4
    assert slots_of(times, 12, 12).tokens_per_s > slots_of(times, 12, 3).tokens_per_s
    assert choose_slots(ring(1.0, 1.0, row_s=0.5), 3).count == 2


@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5),
    st.floats(0.0, 0.1),
    st.floats(0.0, 1.0),
    st.integers(1, 40),
)
def test_a_choice_is_about_the_best_and_never_more_slots_than_samples(alone, row_s, hops, samples):
    times = ring(*alone, row_s=row_s, hops_s=hops)
    chosen = choose_slots(times, samples)
    best = max(slots_of(times, samples, n).tokens_per_s for n in range(1, samples + 1))
    assert 1 <= chosen.count <= samples
    assert chosen.tokens_per_s >= 0.99 * best
    assert chosen.rows(samples) * chosen.count >= samples


@pytest.mark.parametrize(
    ("slots", "gate", "rows", "again_s"),
    [
        (Slots(count=2), Gate(waiting=0, samples=4), 0, None),
        (Slots(count=2), Gate(waiting=4, samples=4), 2, None),
        (Slots(count=2), Gate(waiting=1, samples=4), 1, None),
        (Slots(count=2), Gate(waiting=2, samples=5, away_s=(0.3,)), 2, None),
        (Slots(count=2), Gate(waiting=2, samples=4, away_s=(0.3, 0.1)), 0, 0.7),
        (Slots(count=2, cycle_s=0.2), Gate(waiting=2, samples=4, away_s=(0.04,)), 0, 0.06),
        (Slots(count=2, cycle_s=0.2), Gate(waiting=2, samples=4, away_s=(0.1,)), 2, None),
        # Slots that stay away too long give their place to others.
        (Slots(count=2), Gate(waiting=2, samples=4, away_s=(9.0, 0.1)), 2, None),
        (Slots(count=1), Gate(waiting=9, samples=9), 9, None),
    ],
)
def test_who_leaves(slots, gate, rows, again_s):
    found = departing(slots, gate)
    assert found.rows == rows
    assert found.again_s == (None if again_s is None else pytest.approx(again_s))


def test_what_was_disturbed_is_lowered():
    assert rising([(1, 3.0), (4, 2.0), (16, 5.0)]).points == ((1, 2.0), (4, 2.0), (16, 5.0))


def test_trips_put_stages_right():
    head = line(0.001, 0.0)
    curves = [[(1, 0.01)], [(1, 0.01)]]
    times = ring_times([2, 3], curves, [(1, 0.08)], head)
    assert [stage.at(1) for stage in times.stages] == pytest.approx([0.02, 0.03, 0.001])
    assert times.hops.at(1) == pytest.approx(0.03)
    # Nodes that measured themselves on a busy machine: a trip is quicker than their sum.
    times = ring_times([2, 3], curves, [(1, 0.025)], head)
    assert [stage.at(1) for stage in times.stages] == pytest.approx([0.01, 0.015, 0.001])
    assert times.hops.at(1) == 0.0
    # Nodes that did not measure share the trip by blocks.
    times = ring_times([2, 3], [[], [(1, 0.01)]], [(1, 0.05), (8, 0.1)], head)
    assert times.stages[1].at(8) == pytest.approx(0.06)
    assert times.scaled([2.0, 1.0, 1.0]).stages[0].at(1) == pytest.approx(0.04)


def test_chunks_take_no_longer_than_a_pass_of_decode_rows():
    assert choose_chunk_rows(0.0, 1.0) == 32
    assert choose_chunk_rows(0.001, 0.001) == 32
    assert choose_chunk_rows(0.001, 0.07) == 64
    assert choose_chunk_rows(0.001, 1.0) == 96


def test_samples_at_once_count_whole_pages_of_the_smallest_cache():
    assert samples_at_once([1024, 4096], 100, 32) == 8
    assert samples_at_once([64], 100, 32) == 0


def test_bad_input_names_the_fix():
    with pytest.raises(ConfigError, match="at least 1"):
        Slots(count=0)
    with pytest.raises(ConfigError, match="samples"):
        choose_slots(ring(1.0), 0)
    with pytest.raises(ConfigError, match="stage"):
        RingTimes(stages=(), hops=NOTHING)


def test_blocks_that_are_dealt_out_anew():
    times = ring_times([2, 3], [[(1, 0.01)], [(1, 0.01)]], [(1, 0.08)], line(0.001, 0.0))
    moved = moved_times(times, [2, 3], [5], [[]])
    assert [stage.at(1) for stage in moved.stages] == pytest.approx([0.05, 0.001])
    moved = moved_times(times, [2, 3], [1, 4], [[(1, 0.02), (8, 0.03)], []])
    assert [stage.at(8) for stage in moved.stages] == pytest.approx([0.03, 0.04, 0.001])
    assert moved.hops == times.hops
