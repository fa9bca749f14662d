"""Where peers are in a space of round trips, so that those nobody measured can be estimated.

A coordinate is a point and a *height*: two peers are as far apart as their points, and both
heights on top (the last mile that every way takes). Each peer moves its own a little whenever
it measures a round trip to a peer whose coordinate it knows.

Source: Vivaldi (Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004, section 5.4 on heights), with the
constants and the guards of Serf. Unlike Serf's, the point has 3 dimensions and there is no
adjustment term: on 490 PlanetLab hosts with 6 neighbours each, 8 dimensions and adjustments
were no better (median error 0.15 of the round trip in all three).

Others' coordinates are what they say: nonsense is ignored, nobody is believed to be certain,
one sample moves us `STEP_S_MAX` at most and says at most that we know nothing, and what is far
off while most samples agree is left out of a fit and moves us little afterwards (`far_off`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

DIMENSIONS: Final = 3
"""Of the point: the best of 2, 3, 4, 5 and 8 on PlanetLab's round trips."""

HEIGHT_S_MIN: Final = 1e-5
"""Below the last mile of a machine in a data centre."""

ERROR_MAX: Final = 1.5
"""Of who knows nothing."""

ERROR_OTHER_MIN: Final = 0.05
"""Nobody else is believed to be surer: a liar would carry us away."""

TUNING: Final = 0.25
"""How far a sample moves the coordinate, and the error: of what it asks for (Vivaldi's c)."""

STEP_S_MAX: Final = 0.02
"""No sample moves us farther."""

RELATIVE_ERROR_MAX: Final = 1.0
"""Of one sample: that a claim is a hundred times off makes us no less sure than twice off."""

FAR_OFF: Final = 5.0
"""A sample is far off if we miss it by so many times as much as half of them."""

FAR_OFF_S_MIN: Final = STEP_S_MAX
"""And by more than this: one step puts less right."""

FAR_OFF_SAMPLES_MIN: Final = 4
"""Of fewer, nobody can say which one is wrong."""

STEP_FAR_OFF_S_MAX: Final = 0.001
"""What is far off moves us no farther. It does move us: half of a swarm may be elsewhere."""

REACH_S_MAX: Final = 10.0
"""Round trips that take longer measure queues; points farther out are nonsense."""

RTT_S_MIN: Final = 1e-5
"""Shorter ones are counted as this: loopback."""

USABLE_ERROR: Final = 0.5
"""Who is less sure of its place than this is nowhere: half or double is no estimate."""

FIT_ROUNDS: Final = 32
"""Passes over the same samples that settle a new coordinate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """A peer's place, in seconds of round trip."""

    point: tuple[float, ...] = (0.0,) * DIMENSIONS
    height: float = HEIGHT_S_MIN
    error: float = ERROR_MAX
    """Relative error that it expects of estimates; below `USABLE_ERROR` they are used."""


NOWHERE: Final = Coordinate()
"""Who has measured nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measured round trip to a peer, and where it says it is."""

    there: Coordinate
    rtt_s: float


def is_sound(one: Coordinate) -> bool:
    """Whether it can be a coordinate at all: finite, and on this planet."""
    numbers = (*one.point, one.height, one.error)
    return (
        len(one.point) == DIMENSIONS
        and all(map(math.isfinite, numbers))
        and all(abs(number) <= REACH_S_MAX for number in numbers)
        and one.height >= 0
        and one.error >= 0
    )


def distance_s(one: Coordinate, other: Coordinate) -> float:
    """Estimated round trip between two peers."""
    return math.dist(one.point, other.point) + one.height + other.height


def estimate_s(one: Coordinate | None, other: Coordinate | None) -> float | None:
    """The same where both know where they are; None where one doesn't."""
    if one is None or other is None or max(one.error, other.error) > USABLE_ERROR:
        return None
    return max(RTT_S_MIN, distance_s(one, other))


def nudge(
    mine: Coordinate, sample: Sample, rng: random.Random, step_s_max: float = STEP_S_MAX
) -> Coordinate:
    """Our coordinate after a measured round trip; unchanged if the sample is nonsense.

    `rng` gives the direction in which two peers at the same point part.
    """
    there, rtt_s = sample.there, sample.rtt_s
    if not (math.isfinite(rtt_s) and 0 <= rtt_s <= REACH_S_MAX and is_sound(there)):
        return mine
    rtt_s = max(RTT_S_MIN, rtt_s)
    apart_s = math.dist(mine.point, there.point)
    guess_s = max(RTT_S_MIN, apart_s + mine.height + there.height)
    trust = mine.error / (mine.error + max(ERROR_OTHER_MIN, there.error))
    weight = TUNING * trust
    missed = min(RELATIVE_ERROR_MAX, abs(guess_s - rtt_s) / rtt_s)
    error = missed * weight + mine.error * (1 - weight)
    step_s = max(-step_s_max, min(step_s_max, weight * (rtt_s - guess_s)))
    if apart_s > RTT_S_MIN:
        along = [(a - b) / guess_s for a, b in zip(mine.point, there.point, strict=True)]
    else:
        along = _any_direction(rng)
    moved = (a + step_s * b for a, b in zip(mine.point, along, strict=True))
    height = mine.height + step_s * (mine.height + there.height) / guess_s
    return Coordinate(
        point=tuple(_within(one, -REACH_S_MAX) for one in moved),
        height=_within(height, HEIGHT_S_MIN),
        error=min(ERROR_MAX, error),
    )


def fit(samples: Sequence[Sample], rng: random.Random, start: Coordinate = NOWHERE) -> Coordinate:
    """The coordinate that explains all samples best, as far as some passes over them find it.

    For who has few samples and no time to drift into its place: clients. Samples that are far
    off in the end are left out, and the others fitted again: one liar would spoil it.
    """
    found = _settled(samples, rng, start)
    odd = far_off(found, samples)
    if not any(odd):
        return found
    return _settled([one for one, is_odd in zip(samples, odd, strict=True) if not is_odd],
                    rng, start)  # fmt: skip


def far_off(mine: Coordinate, samples: Sequence[Sample]) -> list[bool]:
    """Which of the samples a coordinate misses by far more than most of them."""
    missed_s = [
        abs(distance_s(mine, one.there) - one.rtt_s) if is_sound(one.there) else math.inf
        for one in samples
    ]
    if len(samples) < FAR_OFF_SAMPLES_MIN:
        return [False] * len(samples)
    limit_s = max(FAR_OFF_S_MIN, FAR_OFF * median(missed_s))
    return [one > limit_s for one in missed_s]


def _settled(samples: Sequence[Sample], rng: random.Random, start: Coordinate) -> Coordinate:
    for _ in range(FIT_ROUNDS):
        for sample in samples:
            start = nudge(start, sample, rng)
    return start


def _any_direction(rng: random.Random) -> list[float]:
    while True:
        found = [rng.uniform(-1, 1) for _ in range(DIMENSIONS)]
        length = math.hypot(*found)
        if 0.1 < length <= 1:
            return [one / length for one in found]


def _within(number: float, low: float) -> float:
    return max(low, min(REACH_S_MAX, number))
