"""Trust that decays, and what is forgiven."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.ids import PeerId
from shoal.client.experience import (
    FAILED_S,
    FAILED_S_MAX,
    INCIDENT_S,
    PAIR_S,
    REGAIN_ROWS,
    REGAIN_S,
    ExperienceBook,
)
from shoal.discovery.coordinates import Locator
from shoal.plan.coordinates import NOWHERE, Coordinate, distance_s

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


def avoided(book, now_s):
    return book.snapshot(now_s).avoid


@given(st.integers(1, 12))
def test_each_failure_doubles_the_time_up_to_a_limit(times):
    book = ExperienceBook()
    for index in range(times):
        last_s = 100.0 + index * INCIDENT_S
        book.failed(A, last_s)
    period_s = min(FAILED_S_MAX, FAILED_S * 2 ** (times - 1))
    assert avoided(book, last_s + period_s - 0.1) == {A}
    assert avoided(book, last_s + period_s) == frozenset()


def test_what_many_sessions_report_of_one_incident_counts_once():
    book = ExperienceBook()
    for index in range(8):
        book.failed(A, 100.0 + index * 0.1)
    assert avoided(book, 100.0 + FAILED_S) == frozenset()


def test_who_works_again_is_used_again_but_not_trusted_as_before():
    book = ExperienceBook()
    book.failed(A, 0.0)
    book.served(A, 1.0)
    assert avoided(book, 1.0) == frozenset()
    book.failed(A, 10.0)
    assert avoided(book, 10.0 + 2 * FAILED_S - 0.1) == {A}
    book.served(A, 11.0)
    assert avoided(book, 11.0) == {A}
    book.served(A, 12.0, REGAIN_ROWS)
    assert avoided(book, 12.0) == frozenset()
    assert book.has_failures
    book.served(A, 13.0, REGAIN_ROWS)
    assert not book.has_failures


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(INCIDENT_S, 100.0)), min_size=1, max_size=12)
)
def test_a_flapping_server_is_avoided_longer_each_time(flaps):
    """A few rows between two failures change nothing of that."""
    book, now_s, periods_s = ExperienceBook(), 0.0, []
    for num_rows, gap_s in flaps:
        book.failed(A, now_s)
        periods_s.append(book._avoid_until_s[A] - now_s)
        for _ in range(num_rows):
            book.served(A, now_s + 1.0)
        now_s += gap_s
    expected_s = [min(FAILED_S_MAX, FAILED_S * 2**index) for index in range(len(flaps))]
    assert periods_s == pytest.approx(expected_s)


@given(
    st.integers(1, 8), st.lists(st.integers(1, 3 * REGAIN_ROWS), max_size=30), st.integers(0, 10)
)
def test_trust_comes_back_by_one_failure_for_so_many_rows_or_so_long(times, rows, waits):
    book = ExperienceBook()
    for index in range(times):
        book.failed(A, index * INCIDENT_S)
    now_s = times * INCIDENT_S
    for num_rows in rows:
        book.served(A, now_s, num_rows)
    left = max(0, times - sum(rows) // REGAIN_ROWS)
    assert book.has_failures == (left > 0)
    now_s += waits * REGAIN_S
    book.failed(A, now_s)
    period_s = min(FAILED_S_MAX, FAILED_S * 2 ** max(0, left - waits))
    assert book._avoid_until_s[A] - now_s == pytest.approx(period_s)


def test_a_busy_server_that_still_serves_others_stays_busy():
    """Rows of an older session say nothing about room for a new one."""
    book = ExperienceBook()
    book.busy(A, 0.0, 5.0)
    assert not book.has_failures
    book.served(A, 1.0)
    assert avoided(book, 4.9) == {A}
    assert avoided(book, 5.0) == frozenset()


def test_busy_never_shortens_what_a_failure_costs():
    book = ExperienceBook()
    book.failed(A, 0.0)
    book.busy(A, 0.0, 1.0)
    assert avoided(book, FAILED_S - 1) == {A}


def test_a_pair_is_directed_and_is_tried_again():
    book = ExperienceBook()
    book.pair_failed(A, B, 10.0)
    assert book.snapshot(10.0 + PAIR_S - 1).unreachable_pairs == {(A, B)}
    assert book.snapshot(10.0 + PAIR_S).unreachable_pairs == frozenset()
    assert avoided(book, 11.0) == frozenset()


def test_the_lowest_round_trip_counts_but_slowly_fades():
    book = ExperienceBook()
    for rtt_s in (0.1, 0.02, 0.5):
        book.round_trip(A, rtt_s)
    assert book.snapshot(0.0).rtt_s[A] == pytest.approx(0.068)
    for _ in range(200):
        book.round_trip(A, 0.5)
    assert book.snapshot(0.0).rtt_s[A] == pytest.approx(0.5, rel=0.01)


def test_a_snapshot_does_not_change():
    book = ExperienceBook()
    before = book.snapshot(0.0)
    book.failed(A, 0.0)
    book.round_trip(A, 1.0)
    assert before.avoid == frozenset()
    assert before.rtt_s == {}


def test_own_sessions_are_counted_when_asked():
    count = {A: 1}
    book = ExperienceBook(lambda: count)
    first = book.snapshot(0.0)
    count[A] = 3
    assert first.sessions == {A: 1}
    assert book.snapshot(0.0).sessions == {A: 3}
    assert ExperienceBook().snapshot(0.0).sessions == {}


def test_a_few_round_trips_tell_where_we_are():
    places = {
        PeerId(bytes([x, y]) * 16): Coordinate(point=(x / 50, y / 50, 0.0), height=0.001, error=0.1)
        for x in range(3)
        for y in range(3)
    }
    me = Coordinate(point=(0.01, 0.03, 0.0), height=0.002, error=0.1)
    book = ExperienceBook(locator=Locator(random.Random(1), places.get))
    assert book.snapshot(0.0).coordinate == NOWHERE
    peers = list(places)
    for peer in peers[:5]:
        book.round_trip(peer, distance_s(me, places[peer]))
    book.round_trip(A, 0.5)  # it says nothing of its place
    found = book.snapshot(0.0).coordinate
    for peer in peers[5:]:
        assert distance_s(found, places[peer]) == pytest.approx(
            distance_s(me, places[peer]), rel=0.5
        )
