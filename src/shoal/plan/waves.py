"""How one client's sessions share a chain: in as many even groups as it has servers.

Left alone rows that once met in a server's queue stay together, and the groups that come of it are
uneven: while the large one is at one server the others idle. Rows that leave in even groups, one
after the other, keep all of them at work. The rule for who leaves when is that of rings
(`plan.slots`); here is what it is told where nobody measured the servers.
"""

from __future__ import annotations

from typing import Final

from shoal.plan.slots import Slots

WAVE_ROWS_MIN: Final = 3
"""Groups smaller than this are not held together. In the lab (two servers whose pass takes 10 ms,
and 1 ms more for each row) groups of 2 gained 5 % alone, and lost 13 % beside three times as many
rows of another client; groups of 3 and more gained in any company."""

TRIP_RISE: Final = 0.05
"""How much of a longer trip counts at once: queues are no reason to leave later."""


def makes_waves(sessions: int, hops: int) -> bool:
    """Whether rows of so many sessions should leave in groups at all."""
    return hops > 1 and sessions >= WAVE_ROWS_MIN * hops


def wave_slots(sessions: int, hops: int, trip_s: float) -> Slots:
    """How so many sessions go round a chain of `hops` servers; `trip_s` (0: not known) is once."""
    if not makes_waves(sessions, hops):
        return Slots(count=max(1, sessions))
    return Slots(count=hops, cycle_s=trip_s / hops)


def expected_trip_s(before_s: float, took_s: float) -> float:
    """What the next trip is taken for: the shortest of late; 0: there was none."""
    if not before_s or took_s < before_s:
        return took_s
    return before_s + TRIP_RISE * (took_s - before_s)
