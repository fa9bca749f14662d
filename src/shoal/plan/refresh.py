"""When a server says anew how fast it is and where: records are slow facts.

What it measured at its start tells how long a decode pass of so many rows takes on a quiet
machine. While it serves, its own passes tell how long they take now: with another process on
the machine, or warm, all of them take longer. The ratio of both, not the time itself, is what
counts: a larger batch is no slower machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

from shoal.plan.coordinates import USABLE_ERROR, Coordinate
from shoal.plan.spec import DecodeTimes

PASSES_MIN: Final = 32
"""Fewer passes say nothing: the first ones of a session pay for set-up."""

SLOWNESS_MIN: Final = 0.25
SLOWNESS_MAX: Final = 16.0
"""Beyond these something else is wrong than the machine's pace."""

CHANGE: Final = 1.3
"""News is what makes passes so many times longer or shorter: clients move for as much."""

MOVED_S: Final = 0.01
"""News is a coordinate that moved by this: a tenth of a usual round trip between continents."""

REST_S: Final = 600.0
"""Who has run nothing for so long counts as on its start again: a slow server is spared, so it
would never run what shows that it has recovered."""


class Pass(NamedTuple):
    """A decode pass that was run."""

    rows: int
    seconds_per_block: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a record says that changes while a server serves."""

    slowness: float = 1.0
    """How many times longer than at the start passes take."""
    coordinate: Coordinate | None = None


def slowness(measured: DecodeTimes, passes: Sequence[Pass]) -> float | None:
    """How many times longer than `measured` these passes took; None: too few to tell."""
    ratios = [
        one.seconds_per_block / measured.at(one.rows)
        for one in passes
        if measured.at(one.rows) > 0 and math.isfinite(one.seconds_per_block)
    ]
    if len(ratios) < PASSES_MIN:
        return None
    return min(SLOWNESS_MAX, max(SLOWNESS_MIN, median(ratios)))


def standing(
    said: Standing,
    measured: DecodeTimes,
    passes: Iterable[Pass],
    now_s: float,
    coordinate: Coordinate | None,
) -> Standing:
    """What holds at `now_s`, if `said` held until now."""
    recent = [one for one in passes if now_s - one.ended_s < REST_S]
    found = slowness(measured, recent) if recent else 1.0
    return Standing(slowness=said.slowness if found is None else found, coordinate=coordinate)


def is_news(said: Standing, now: Standing) -> bool:
    """Whether the difference is worth a new record that everybody has to take."""
    if not 1 / CHANGE < now.slowness / said.slowness < CHANGE:
        return True
    return _has_moved(said.coordinate, now.coordinate)


def _has_moved(said: Coordinate | None, now: Coordinate | None) -> bool:
    if now is None or now.error > USABLE_ERROR:
        return False  # it says nothing that could be used
    if said is None or said.error > USABLE_ERROR:
        return True
    return math.dist(said.point, now.point) + abs(said.height - now.height) > MOVED_S
