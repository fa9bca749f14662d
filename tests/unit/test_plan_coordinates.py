"""Coordinates: they converge where they can, and nothing that is said makes them nonsense."""

import math
import random
from itertools import combinations
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.discovery.coordinates import Locator
from shoal.plan.coordinates import (
    DIMENSIONS,
    ERROR_MAX,
    HEIGHT_S_MIN,
    NOWHERE,
    REACH_S_MAX,
    STEP_S_MAX,
    USABLE_ERROR,
    Coordinate,
    Sample,
    distance_s,
    estimate_s,
    fit,
    is_sound,
    nudge,
)
from shoal.plan.cost import RTT_UNKNOWN_S
from shoal.plan.distance import likely_rtt_s

any_float = st.floats(allow_nan=True, allow_infinity=True, width=64)
any_coordinate = st.builds(
    Coordinate,
    point=st.lists(any_float, min_size=0, max_size=5).map(tuple),
    height=any_float,
    error=any_float,
)


def spread(count, rng, *, height_s=0.0):
    """Points in a box of 100 ms, each with a last mile."""
    return [
        Coordinate(
            point=tuple(rng.uniform(0, 0.1) for _ in range(DIMENSIONS)),
            height=rng.uniform(HEIGHT_S_MIN, height_s) if height_s else HEIGHT_S_MIN,
            error=0.0,
        )
        for _ in range(count)
    ]


def settled(truth, rng, rounds):
    """All of them as they find their places by the distances between `truth`'s."""
    found = [NOWHERE] * len(truth)
    for _ in range(rounds):
        for one in range(len(truth)):
            other = rng.choice([index for index in range(len(truth)) if index != one])
            rtt_s = distance_s(truth[one], truth[other])
            found[one] = nudge(found[one], Sample(there=found[other], rtt_s=rtt_s), rng)
    return found


def errors(truth, found):
    pairs = list(combinations(range(len(truth)), 2))
    real = [distance_s(truth[one], truth[other]) for one, other in pairs]
    said = [distance_s(found[one], found[other]) for one, other in pairs]
    return sorted(abs(a - b) / a for a, b in zip(real, said, strict=True))


def test_what_lies_in_space_is_found_as_a_rule():
    """The median over swarms: one of them may settle in a fold."""
    medians = []
    for seed in range(8):
        rng = random.Random(seed)
        truth = spread(16, rng)
        medians.append(median(errors(truth, settled(truth, rng, 400))))
    assert median(medians) < 0.03


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_what_lies_in_space_is_found(seed):
    rng = random.Random(seed)
    truth = spread(16, rng)
    found = settled(truth, rng, 400)
    # 0.02 as a rule; the worst of 80 seeds came to 0.074, where some settled in a fold.
    assert median(errors(truth, found)) < 0.15
    assert median(one.error for one in found) < 0.15


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_last_miles_are_found_too(seed):
    rng = random.Random(seed)
    truth = spread(16, rng, height_s=0.05)
    assert median(errors(truth, settled(truth, rng, 600))) < 0.08


def test_heights_are_needed_for_last_miles():
    """A hub with spokes: nobody is near anybody. No points are so."""
    rng = random.Random(1)
    hub = [Coordinate(height=0.02 + 0.001 * one, error=0.0) for one in range(16)]
    found = settled(hub, rng, 600)
    assert median(errors(hub, found)) < 0.05
    assert median(one.height for one in found) > 0.01


@given(any_coordinate, any_coordinate, any_float, st.integers(0, 100))
def test_nothing_that_is_said_makes_nonsense(mine, there, rtt_s, seed):
    start = mine if is_sound(mine) else NOWHERE
    found = nudge(start, Sample(there=there, rtt_s=rtt_s), random.Random(seed))
    assert is_sound(found)
    assert math.dist(found.point, start.point) <= STEP_S_MAX * (1 + 1e-6)
    assert math.isfinite(distance_s(found, start))


@given(any_coordinate.filter(lambda one: not is_sound(one)), st.floats(0, 1))
def test_nonsense_moves_nobody(there, rtt_s):
    assert nudge(NOWHERE, Sample(there=there, rtt_s=rtt_s), random.Random(1)) is NOWHERE


@pytest.mark.parametrize("rtt_s", [math.nan, math.inf, -1.0, REACH_S_MAX * 2])
def test_round_trips_that_can_not_be_move_nobody(rtt_s):
    assert nudge(NOWHERE, Sample(there=NOWHERE, rtt_s=rtt_s), random.Random(1)) is NOWHERE


def test_one_liar_among_honest_peers_does_little():
    """It says that it is far away and sure of it, and answers at once."""
    rng = random.Random(3)
    truth = spread(12, rng, height_s=0.02)
    me, others = truth[0], truth[1:]
    honest = [Sample(there=one, rtt_s=distance_s(me, one)) for one in others]
    liar = Sample(there=Coordinate(point=(9.0, 9.0, 9.0), error=0.0), rtt_s=1e-4)
    found = NOWHERE
    for _ in range(60):
        for sample in [*honest, liar]:
            found = nudge(found, sample, rng)
    off = [abs(distance_s(found, one.there) - one.rtt_s) / one.rtt_s for one in honest]
    assert median(off) < 0.6
    for sample in honest * 8:
        found = nudge(found, sample, rng)
    off = [abs(distance_s(found, one.there) - one.rtt_s) / one.rtt_s for one in honest]
    assert median(off) < 0.15, "and it is forgotten as soon as it is silent"


def test_a_few_samples_place_a_newcomer():
    rng = random.Random(5)
    truth = spread(40, rng, height_s=0.01)
    me, known, unknown = truth[0], truth[1:7], truth[7:]
    found = fit([Sample(there=one, rtt_s=distance_s(me, one)) for one in known], rng)
    off = [abs(distance_s(found, one) - distance_s(me, one)) / distance_s(me, one)
           for one in unknown]  # fmt: skip
    assert median(off) < 0.15


LIARS = {
    "says it is far away": Sample(there=Coordinate(point=(9.0, 0.0, 0.0), error=0.0), rtt_s=0.03),
    "answers late": Sample(there=Coordinate(point=(0.05,) * 3, error=0.0), rtt_s=9.0),
}


def test_a_claim_however_far_off_makes_us_no_less_sure_than_knowing_nothing():
    sure = Coordinate(point=(0.02, 0.0, 0.0), error=0.02)
    found = nudge(sure, LIARS["says it is far away"], random.Random(1))
    assert found.error < 0.3


@pytest.mark.parametrize("liar", LIARS.values(), ids=LIARS)
def test_one_liar_among_few_spoils_no_fit(liar):
    rng = random.Random(7)
    truth = spread(5, rng, height_s=0.02)
    honest = [Sample(there=one, rtt_s=distance_s(truth[0], one)) for one in truth[1:]]
    found = fit([*honest[:2], liar, *honest[2:]], rng)
    assert found.error < 0.2
    for sample in honest:
        assert distance_s(found, sample.there) == pytest.approx(sample.rtt_s, abs=0.01)


@pytest.mark.parametrize("liar", LIARS.values(), ids=LIARS)
def test_one_liar_among_few_moves_nobody_away_in_time(liar):
    rng = random.Random(7)
    truth = spread(5, rng, height_s=0.02)
    trips = {one: Sample(there=at, rtt_s=distance_s(truth[0], at)) for one, at in
             zip("abcd", truth[1:], strict=True)} | {"liar": liar}  # fmt: skip
    locator = Locator(rng, lambda peer: trips[peer].there)
    for _ in range(40):
        for peer, sample in trips.items():
            locator.measured(peer, sample.rtt_s)
    found = locator.coordinate
    assert found.error < USABLE_ERROR
    off_s = [abs(distance_s(found, trips[one].there) - trips[one].rtt_s) for one in "abcd"]
    assert median(off_s) < 0.01


def test_two_distant_halves_of_a_swarm_find_each_other():
    """To each half the other is far off at first, and it must not stay so."""
    rng = random.Random(4)
    truth = [
        Coordinate(point=(rng.uniform(0, 0.003) + 0.1 * (one % 2), 0.0, 0.0), height=0.0005)
        for one in range(12)
    ]
    locators = {}
    for one in range(12):
        locators[one] = Locator(rng, lambda peer: locators[peer].coordinate)
    for _ in range(20):
        for one, locator in locators.items():
            other = (one + rng.randrange(1, 12)) % 12
            locator.measured(other, distance_s(truth[one], truth[other]))
    assert median(errors(truth, [one.coordinate for one in locators.values()])) < 0.1


def test_two_at_one_place_part_in_any_direction():
    found = nudge(NOWHERE, Sample(there=NOWHERE, rtt_s=0.1), random.Random(1))
    assert any(found.point)
    assert distance_s(found, NOWHERE) > 2 * HEIGHT_S_MIN


def test_who_is_unsure_is_not_used():
    sure = Coordinate(point=(0.05, 0.0, 0.0), error=0.1)
    here = Coordinate(error=0.1)
    assert estimate_s(here, sure) == pytest.approx(0.05, rel=1e-2)
    assert estimate_s(here, Coordinate(error=USABLE_ERROR * 1.01)) is None
    assert estimate_s(here, NOWHERE) is None
    assert estimate_s(None, sure) is None
    assert NOWHERE.error == ERROR_MAX


def test_measured_before_estimated_before_assumed():
    sure, here = Coordinate(point=(0.05, 0.0, 0.0), error=0.1), Coordinate(error=0.1)
    assert likely_rtt_s(0.2, here, sure) == 0.2
    assert likely_rtt_s(None, here, sure) == pytest.approx(0.05, rel=1e-2)
    assert likely_rtt_s(None, None, sure) == RTT_UNKNOWN_S
