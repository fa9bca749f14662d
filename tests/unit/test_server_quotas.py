"""The line before a full server, and who gives up log when memory is short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, SessionId
from shoal.server.quotas import (
    PLACE_GRACE_S,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_S,
    Line,
    Quotas,
    owners_over,
)


def session(number):
    return SessionId(bytes([number]) * 16)


def test_first_come_first_served():
    line = Line()
    assert [line.wait(session(number), 0.0)[0] for number in (1, 2, 3)] == [1, 2, 3]
    assert line.wait(session(2), 1.0)[0] == 2
    line.leave(session(1))
    assert line.ahead_of(session(2), 1.0) == 0
    assert line.ahead_of(session(9), 1.0) == 2


def test_a_place_lapses_when_nobody_comes_for_it():
    line = Line()
    _, eta_s = line.wait(session(1), 0.0)
    assert line.ahead_of(session(2), eta_s + PLACE_GRACE_S) == 1
    assert line.ahead_of(session(2), eta_s + PLACE_GRACE_S + 0.1) == 0
    assert len(line) == 0


def test_the_wait_is_told_from_how_often_somebody_leaves():
    line = Line()
    for second in range(0, 60, 10):
        line.departed(float(second))
    etas = [line.wait(session(number), 59.0)[1] for number in (1, 2, 3, 4)]
    assert etas == [10.0, 20.0, RETRY_AFTER_MAX_S, RETRY_AFTER_MAX_S]
    line = Line()
    assert line.wait(session(1), 0.0)[1] == RETRY_AFTER_S
    for _ in range(600):
        line.departed(0.0)
    assert line.wait(session(1), 0.0)[1] == RETRY_AFTER_S


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
