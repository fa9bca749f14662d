"""How many slots: where trials begin, which neighbours are tried, what stays."""

from __future__ import annotations

import pytest

from shoal.hf.ring_times import SETTLE_TRIPS, TRIAL_S, TRIAL_TRIPS, Trial, TrialClock
from shoal.plan.slot_trials import choose_measured
from shoal.plan.slots import RingTimes, choose_slots
from shoal.plan.spec import DecodeTimes


def line(alone_s, row_s):
    return DecodeTimes(points=((1, alone_s + row_s), (100, alone_s + 100 * row_s)))


TWO = RingTimes(stages=(line(0.010, 0.001),) * 2, hops=DecodeTimes(points=((1, 0.001),)))


def settled(times, samples, speeds):
    """The number that stays where each gives `speeds`, and the order of trials."""
    measured, order = {}, []
    for _ in range(20):
        count = choose_measured(times, samples, measured).count
        if count in measured:
            return count, order
        order.append(count)
        measured[count] = speeds[count]
    raise AssertionError(order)


def test_trials_begin_with_what_is_reckoned():
    assert choose_measured(TWO, 12, {}) == choose_slots(TWO, 12)
    assert choose_slots(TWO, 12).count == 2


@pytest.mark.parametrize(
    ("speeds", "stays", "tried"),
    [
        ({1: 90.0, 2: 100.0, 3: 95.0}, 2, [2, 1, 3]),
        ({1: 130.0, 2: 120.0}, 1, [2, 1]),  # nodes share a memory
        ({1: 90.0, 2: 100.0, 3: 120.0, 4: 110.0}, 3, [2, 1, 3, 4]),  # long ways
        ({1: 102.0, 2: 100.0, 3: 101.0}, 2, [2, 1, 3]),  # as good as equal
    ],
)
def test_neighbours_are_tried_and_the_best_stays(speeds, stays, tried):
    assert settled(TWO, 12, speeds) == (stays, tried)


def test_what_is_reckoned_to_be_much_worse_is_not_tried():
    rows_only = RingTimes(stages=(line(0.0, 0.01),) * 4, hops=DecodeTimes(points=((1, 0.0),)))
    assert settled(rows_only, 4, {4: 100.0}) == (4, [4])


def test_the_speed_is_the_measured_one():
    found = choose_measured(TWO, 1, {1: 7.0})
    assert (found.count, found.tokens_per_s) == (1, 7.0)
    assert found.cycle_s > 0


def tell(clock, trial, count, step_s, at_s=0.0):
    """Tokens in equal steps; the times at which trials were complete."""
    done = []
    for _ in range(count):
        at_s += step_s
        if clock.came(at_s, trial):
            done.append(at_s)
    return done


def test_a_trial_takes_some_trips_after_some():
    clock, trial = TrialClock(), Trial(2, 2, 5)
    needed = 1 + (SETTLE_TRIPS + TRIAL_TRIPS) * 2
    assert len(tell(clock, trial, needed - 1, 0.1)) == 0
    assert len(tell(clock, trial, 1, 0.1, 0.1 * (needed - 1))) == 1
    assert clock.measured == {2: {2: pytest.approx(10.0)}}
    clock.forget()
    assert clock.measured == {}


def test_a_quick_ring_is_timed_for_long_enough():
    done = tell(TrialClock(), Trial(1, 1, 1), 1000, 0.001)
    assert done[0] >= TRIAL_S
    assert len(done) == 2


def test_what_changes_begins_anew():
    clock = TrialClock()
    few = SETTLE_TRIPS + TRIAL_TRIPS
    for trial in (Trial(1, 1, 1), Trial(1, 1, 2), Trial(2, 1, 2), None, Trial(1, 1, 1), None):
        assert tell(clock, trial, few, 1.0) == []
    assert clock.measured == {}
