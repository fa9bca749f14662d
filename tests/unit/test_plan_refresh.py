"""What is news about a server that serves, in tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.coordinates import NOWHERE, Coordinate
from shoal.plan.refresh import (
    CHANGE,
    MOVED_S,
    PASSES_MIN,
    REST_S,
    SLOWNESS_MAX,
    SLOWNESS_MIN,
    Pass,
    Standing,
    is_news,
    slowness,
    standing,
)
from shoal.plan.spec import DecodeTimes

CURVE = DecodeTimes(points=((1, 0.01), (8, 0.02)))


def passes(seconds, *, rows=1, count=PASSES_MIN, ended_s=0.0):
    return [Pass(rows, seconds, ended_s)] * count


def test_a_larger_batch_is_no_slower_machine():
    assert slowness(CURVE, passes(0.02, rows=8)) == pytest.approx(1.0)
    assert slowness(CURVE, passes(0.02)) == pytest.approx(2.0)
    assert slowness(CURVE, passes(0.02) + passes(0.04, rows=8)) == pytest.approx(2.0)


def test_few_passes_and_unmeasured_speeds_say_nothing():
    assert slowness(CURVE, passes(0.02, count=PASSES_MIN - 1)) is None
    assert slowness(DecodeTimes(points=((1, 0.0),)), passes(0.02)) is None
    said = Standing(slowness=3.0)
    assert standing(said, CURVE, passes(0.02, count=3), 1.0, None).slowness == 3.0


def test_single_slow_passes_do_not_count():
    assert slowness(CURVE, passes(0.01) + passes(1.0, count=10)) == pytest.approx(1.0)


def test_who_rested_is_as_at_the_start():
    said = Standing(slowness=3.0)
    assert standing(said, CURVE, [], 0.0, None).slowness == 1.0
    old = passes(0.05)
    assert standing(said, CURVE, old, REST_S - 1, None).slowness == pytest.approx(5.0)
    assert standing(said, CURVE, old, REST_S, None).slowness == 1.0
    fresh = passes(0.01, count=3, ended_s=REST_S)
    assert standing(Standing(), CURVE, old + fresh, REST_S, None).slowness == 1.0


@given(st.lists(st.floats(0, math.inf, allow_nan=False), min_size=PASSES_MIN))
def test_whatever_was_measured_it_stays_in_bounds(times):
    found = slowness(CURVE, [Pass(1, seconds, 0.0) for seconds in times])
    assert found is None or SLOWNESS_MIN <= found <= SLOWNESS_MAX


@pytest.mark.parametrize(
    ("said", "now", "expected"),
    [
        (1.0, 1.0, False),
        (1.0, CHANGE * 0.99, False),
        (1.0, CHANGE * 1.01, True),
        (1.0, 0.99 / CHANGE, True),
        (4.0, 4.0 * CHANGE * 0.99, False),
        (4.0, 1.0, True),
    ],
)
def test_speeds_that_are_news(said, now, expected):
    assert is_news(Standing(slowness=said), Standing(slowness=now)) is expected


def at(x, *, height=0.001, error=0.1):
    return Standing(coordinate=Coordinate(point=(x, 0.0, 0.0), height=height, error=error))


@pytest.mark.parametrize(
    ("said", "now", "expected"),
    [
        (Standing(), Standing(), False),
        (Standing(), Standing(coordinate=NOWHERE), False),
        (Standing(), at(0.0), True),
        (Standing(coordinate=NOWHERE), at(0.0), True),
        (at(0.0), at(0.9 * MOVED_S), False),
        (at(0.0), at(1.1 * MOVED_S), True),
        (at(0.0), at(0.0, height=0.001 + 1.1 * MOVED_S), True),
        (at(0.0), at(1.0, error=1.0), False),
    ],
)
def test_places_that_are_news(said, now, expected):
    assert is_news(said, now) is expected
