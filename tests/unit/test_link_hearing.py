"""When a data link asks whether it is heard, and when it is given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.limits import ALIVE_PERIOD_S
from shoal.link.hearing import ROUND_TRIP_S_MAX, SILENT_S, SLOW_BYTES_PER_S, Hearing, Judgement

MANY = 1 << 60


def watch(hearing, until_s, *, start_s=0.0, is_owed=True):
    """Look as often as it wants; returns (when, what) of all that is not waiting."""
    told, now_s = [], start_s
    while now_s <= until_s:
        judgement = hearing.look(now_s, is_owed=is_owed, unacked_bytes=MANY)
        if judgement is not Judgement.WAIT:
            told.append((pytest.approx(now_s), judgement))
        if judgement is Judgement.GIVE_UP:
            break
        now_s += max(1e-6, hearing.wait_s(now_s))
    return told


def test_two_questions_then_given_up():
    hearing = Hearing()
    hearing.sent(0, 0.0)
    assert watch(hearing, 10.0) == [
        (ALIVE_PERIOD_S, Judgement.ASK),
        (2 * ALIVE_PERIOD_S, Judgement.ASK),
        (SILENT_S, Judgement.GIVE_UP),
    ]


def test_nothing_is_asked_where_nothing_is_owed():
    hearing = Hearing()
    hearing.sent(100, 0.0)
    assert watch(hearing, 60.0, is_owed=False) == []


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 0.0), (SLOW_BYTES_PER_S, 1.0)])
def test_what_was_sent_before_may_take_its_time(num_bytes, seconds):
    hearing = Hearing()
    hearing.sent(num_bytes, 0.0)
    assert watch(hearing, 10.0)[-1] == (SILENT_S + seconds, Judgement.GIVE_UP)


def test_what_was_acknowledged_is_not_waited_for():
    hearing = Hearing()
    hearing.sent(100 * SLOW_BYTES_PER_S, 0.0)
    for now_s in (0.0, ALIVE_PERIOD_S, 2 * ALIVE_PERIOD_S):
        hearing.look(now_s, is_owed=True, unacked_bytes=0)
    assert hearing.look(SILENT_S, is_owed=True, unacked_bytes=0) is Judgement.GIVE_UP


def test_a_new_row_is_asked_after_as_soon_as_the_first():
    """Though nothing but answers came for a while."""
    hearing, now_s = Hearing(), 0.0
    hearing.sent(0, now_s)
    gaps_s = []
    for _ in range(8):
        since_s = now_s
        while (what := hearing.look(now_s, is_owed=True, unacked_bytes=0)) is Judgement.WAIT:
            now_s += max(1e-6, hearing.wait_s(now_s))
        assert what is Judgement.ASK
        gaps_s.append(now_s - since_s)
        hearing.heard(now_s, is_answer=True)
    assert gaps_s == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0])
    now_s += 0.3
    hearing.sent(0, now_s)
    told = watch(hearing, now_s + 10.0, start_s=now_s)
    assert told[-1][1] is Judgement.GIVE_UP
    assert told[-1][0] == now_s + SILENT_S


def test_who_was_stopped_itself_listens_first():
    hearing = Hearing()
    hearing.sent(0, 0.0)
    assert watch(hearing, 0.9)
    assert hearing.look(20.0, is_owed=True, unacked_bytes=MANY) is Judgement.WAIT
    told = watch(hearing, 30.0, start_s=20.0 + hearing.wait_s(20.0))
    assert told[-1] == (20.0 + SILENT_S, Judgement.GIVE_UP)


@given(
    round_trip_s=st.floats(0.0, ROUND_TRIP_S_MAX - 0.01),
    rows=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 1 << 20)), max_size=20),
)
def test_whoever_answers_is_never_given_up(round_trip_s, rows):
    """Questions and rows are answered after a round trip, and as slowly as the path carries."""
    hearing, now_s, answers_s, line_s = Hearing(), 0.0, [], 0.0
    rows = list(rows)
    while now_s < 60.0:
        if rows and rows[0][0] <= now_s:
            size = rows.pop(0)[1]
            hearing.sent(size, now_s)
            line_s = max(now_s, line_s) + size / SLOW_BYTES_PER_S
        judgement = hearing.look(now_s, is_owed=True, unacked_bytes=MANY)
        assert judgement is not Judgement.GIVE_UP
        if judgement is Judgement.ASK:
            answers_s.append(max(now_s, line_s) + round_trip_s)
        next_s = now_s + max(0.01, hearing.wait_s(now_s))
        while answers_s and answers_s[0] <= next_s:
            hearing.heard(answers_s.pop(0), is_answer=True)
        now_s = next_s


@given(
    silent_s=st.floats(0.0, 5.0),
    heard=st.lists(st.floats(0.01, 0.4), max_size=30),
)
def test_silence_is_noticed_in_bounded_time(silent_s, heard):
    """Whatever came before: a path that ends is given up within the bound."""
    hearing, now_s = Hearing(), silent_s
    hearing.sent(0, now_s)
    for gap_s in heard:
        now_s += gap_s
        hearing.look(now_s, is_owed=True, unacked_bytes=MANY)
        hearing.heard(now_s, is_answer=False)
    told = watch(hearing, now_s + 10.0, start_s=now_s)
    assert told[-1][1] is Judgement.GIVE_UP
    assert told[-1][0].expected <= now_s + SILENT_S + 2 * ROUND_TRIP_S_MAX
