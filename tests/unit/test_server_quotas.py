"""The line before a full server, and who gives up log when memory is short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, SessionId
from shoal.server.quotas import (
    BURST_S,
    DEPARTURES_MAX,
    PLACE_GRACE_S,
    PLACES_PER_CLIENT,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_S,
    Line,
    Quotas,
    Rates,
    owners_over,
)

OWNER, OTHER = PeerId(b"o" * 32), PeerId(b"p" * 32)


def session(number):
    return SessionId(bytes([number]) * 16)


def test_first_come_first_served():
    line = Line()
    assert [line.wait(session(number), OWNER, 0.0)[0] for number in (1, 2, 3)] == [1, 2, 3]
    assert line.wait(session(2), OWNER, 1.0)[0] == 2
    line.leave(session(1), OTHER)
    assert line.ahead_of(session(2), 1.0) == 1
    line.leave(session(1), OWNER)
    assert line.ahead_of(session(2), 1.0) == 0
    assert line.ahead_of(session(9), 1.0) == 2


def test_a_place_lapses_when_nobody_comes_for_it():
    line = Line()
    _, eta_s = line.wait(session(1), OWNER, 0.0)
    assert line.ahead_of(session(2), eta_s + PLACE_GRACE_S) == 1
    assert line.ahead_of(session(2), eta_s + PLACE_GRACE_S + 0.1) == 0
    assert len(line) == 0


def test_the_wait_is_told_from_how_often_somebody_leaves():
    line = Line()
    for second in range(0, 60, 10):
        line.departed(float(second))
    etas = [line.wait(session(number), OWNER, 59.0)[1] for number in (1, 2, 3, 4)]
    assert etas == [10.0, 20.0, RETRY_AFTER_MAX_S, RETRY_AFTER_MAX_S]
    line = Line()
    assert line.wait(session(1), OWNER, 0.0)[1] == RETRY_AFTER_S
    for _ in range(600):
        line.departed(0.0)
    assert line.wait(session(1), OWNER, 0.0)[1] == RETRY_AFTER_S


@given(st.dictionaries(st.integers(0, 20), st.integers(1, 1000), max_size=10), st.integers(1, 3000))
def test_the_largest_give_up_until_all_fit(sizes, limit):
    held = {PeerId(bytes([number]) * 32): size for number, size in sizes.items()}
    over = owners_over(held, limit)
    assert bool(over) == (sum(held.values()) > limit)
    part = limit // max(1, len(held))
    assert sum(min(size, part) if o in over else size for o, size in held.items()) <= limit
    assert all(held[o] >= held[other] for o in over for other in held if other not in over)


@pytest.mark.parametrize("name", sorted(Quotas.__slots__))
def test_quotas_of_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        Quotas(**{name: 0})
    assert getattr(Quotas(**{name: 1}), name) == 1


def test_no_client_fills_the_line():
    line = Line()
    for number in range(PLACES_PER_CLIENT + 5):
        line.wait(session(number), OWNER, 0.0)
    assert len(line) == PLACES_PER_CLIENT
    assert line.wait(session(99), OTHER, 0.0)[0] == PLACES_PER_CLIENT + 1
    line.keep_only(OWNER, {session(3)})
    assert line.ahead_of(session(99), 0.0) == 1


def test_departures_are_not_remembered_for_ever():
    line = Line()
    for _ in range(2 * DEPARTURES_MAX):
        line.departed(0.0)
    assert len(line._departures) == DEPARTURES_MAX


def test_who_takes_more_than_its_rate_waits_and_nobody_else():
    rates = Rates(100)
    rates.took(OWNER, 150, 10.0)
    assert rates.wait_s(OWNER, 10.0) == pytest.approx(1.5 - BURST_S)
    assert rates.wait_s(OTHER, 10.0) == 0.0
    assert rates.wait_s(OWNER, 10.6) == 0.0
    rates.forget_paid(11.0)
    assert rates.wait_s(OWNER, 11.0) == 0.0
    rates.forget_paid(12.0)
    rates.took(OWNER, 50, 12.0)
    assert rates.wait_s(OWNER, 12.0) == 0.0
