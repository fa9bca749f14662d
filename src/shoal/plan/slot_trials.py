"""How many slots a ring has, by what they really give: the reckoned ones are where trials begin.

`plan.slots` reckons with stages that don't disturb each other. Where nodes share a core or a
memory they do, and a pass that reads weights alone is quicker than two at a time. So neighbours of
the best number so far are tried, each for some trips, and what gives most tokens per second stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from shoal.plan.slots import RingTimes, Slots, choose_slots, slots_of

TRY_SHARE: Final = 0.6
"""Numbers that are reckoned to give less than this of the best are not tried."""

BETTER: Final = 1.03
"""A measured speed must be so much better to be left for another number: speeds waver."""


def choose_measured(times: RingTimes, samples: int, measured: Mapping[int, float]) -> Slots:
    """The number of slots to have now: the best one measured, or a neighbour to be tried.

    `measured`: tokens per second by number of slots, with so many samples.

    Raises:
        ConfigError: less than one sample.
    """
    first = choose_slots(times, samples)
    counts = _distinct(samples, first.count)
    known = {count: measured[count] for count in counts if count in measured}
    if first.count not in known:
        return first
    best = first.count
    for count in sorted(known, key=lambda one: known[one]):
        if known[count] > known[best] * (1.0 if count == first.count else BETTER):
            best = count
    at = counts.index(best)
    for count in (*counts[max(0, at - 1) : at], *counts[at + 1 : at + 2]):
        reckoned = slots_of(times, samples, count)
        if count not in known and reckoned.tokens_per_s >= TRY_SHARE * first.tokens_per_s:
            return reckoned
    return replace(slots_of(times, samples, best), tokens_per_s=known[best])


def _distinct(samples: int, always: int) -> list[int]:
    """Numbers of slots that differ in their rows: of equal ones the fewest, or `always`."""
    by_rows = {-(-samples // count): count for count in range(samples, 0, -1)}
    by_rows[-(-samples // always)] = always
    return sorted(by_rows.values())
