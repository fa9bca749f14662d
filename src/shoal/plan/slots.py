"""Slots of a ring: how many groups of samples go round it at a time, and how many rows in each.

Stage i takes `t_i(b)` for b rows, the ways between stages `h(b)` in all. With S slots of
b = n/S rows each a slot leaves every

    cycle(S) = max( max_i t_i(b), (sum_i t_i(b) + h(b)) / S )

seconds, which gives b / cycle(S) tokens per second. Few slots leave stages idle; many read all
weights again for every few rows. The formulas are derived from `t(b)` alone; nothing here knows
where the times come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.plan.spec import DecodeTimes

WORTH: Final = 1.01
"""More slots must give this much more: fewer groups mean fewer passes and frames."""

GAP_SHARE: Final = 0.5
"""Slots leave at least this share of a cycle after one another, so that two that came back
together are two again. Half: stage times that are taken for twice what they are cost nothing."""

HOLD_TRIPS: Final = 8.0
HOLD_MIN_S: Final = 1.0
"""A slot that stays away longer than so many trips round the ring, and at least so long, gives
its place to others: its samples may wait for cache that only others can give back."""

CLOCK_STEP_S: Final = 1e-5
"""A turn this near has come: sums of floats don't end in the same place."""

CHUNK_ROWS: Final = (96, 64, 32)
"""Rows per chunk of a prompt, best first: whole tiles of 32, and no more than sessions without a
ring have (`shoal.client.chain_session`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingTimes:
    """What was measured of a ring."""

    stages: tuple[DecodeTimes, ...]
    """Seconds of a decode pass of so many rows through the whole of each stage; the head is one."""
    hops: DecodeTimes
    """Seconds that so many rows are on the way between stages, all ways together."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a ring has at least one stage")

    def longest_s(self, rows: float) -> float:
        """The slowest stage's pass."""
        return max(stage.at(rows) for stage in self.stages)

    def trip_s(self, rows: float) -> float:
        """Once round the ring, if nobody is in the way."""
        return sum(stage.at(rows) for stage in self.stages) + self.hops.at(rows)

    def scaled(self, factors: Sequence[float]) -> RingTimes:
        """The same ring whose stages take so many times as long as was measured."""
        stages = [
            DecodeTimes(points=tuple((rows, seconds * by) for rows, seconds in stage.points))
            for stage, by in zip(self.stages, factors, strict=True)
        ]
        return replace(self, stages=tuple(stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How samples go round."""

    count: int
    """Groups under way at a time."""
    cycle_s: float = 0.0
    """One leaves so often; 0: not known."""
    tokens_per_s: float = 0.0
    """Of all samples together; 0: not known."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"{self.count} slots: at least 1")

    def rows(self, samples: int) -> int:
        """Samples in each, at most."""
        return -(-samples // self.count)

    @property
    def gap_s(self) -> float:
        """Two slots leave at least so long after one another."""
        return GAP_SHARE * self.cycle_s

    @property
    def hold_s(self) -> float:
        """A slot that is away longer does not count as under way."""
        return max(HOLD_MIN_S, HOLD_TRIPS * self.count * self.cycle_s)


def slots_of(times: RingTimes, samples: int, count: int) -> Slots:
    """What `count` slots of the samples would give.

    Raises:
        ConfigError: less than one slot or sample.
    """
    if samples < 1:
        raise ConfigError(f"{samples} samples: a ring needs at least 1")
    slots = Slots(count=count)
    rows = samples / count
    # Slots differ by one row at most: the slowest stage takes a mean slot's time for each, and
    # the fullest one's way round is the longest.
    cycle_s = max(times.longest_s(rows), times.trip_s(slots.rows(samples)) / count)
    speed = rows / cycle_s if cycle_s > 0 else 0.0
    return replace(slots, cycle_s=cycle_s, tokens_per_s=speed)


def choose_slots(times: RingTimes, samples: int) -> Slots:
    """The number of slots that gives most tokens per second; the fewest of about equal ones.

    Raises:
        ConfigError: less than one sample.
    """
    best = slots_of(times, samples, 1)
    for count in range(2, samples + 1):
        one = slots_of(times, samples, count)
        if one.tokens_per_s > best.tokens_per_s * WORTH:
            best = one
    return best


def rising(points: Sequence[tuple[int, float]]) -> DecodeTimes:
    """Measured times as they must be: more rows never take less. What was disturbed is lowered."""
    lowest, found = math.inf, []
    for rows, seconds in sorted(points, reverse=True):
        lowest = min(lowest, seconds)
        found.append((rows, lowest))
    return DecodeTimes(points=tuple(reversed(found)))


def ring_times(
    spans: Sequence[int],
    curves: Sequence[Sequence[tuple[int, float]]],
    trips: Sequence[tuple[int, float]],
    head: DecodeTimes,
) -> RingTimes:
    """What is known of a ring: stages as they measured themselves, put right by whole trips.

    Args:
        spans: blocks of each stage.
        curves: (rows, seconds of a pass through one block) of each; empty: it did not measure.
        trips: (rows, seconds once round without the head), measured one slot at a time.
        head: embedding and head, which are a stage of their own.

    What a trip takes beyond all passes is the ways; stages that say they take longer than a whole
    trip were measured on a busy machine and are scaled down. Where a stage did not measure, the
    trip is shared out by blocks.

    Raises:
        ConfigError: no trip was measured.
    """
    whole = rising(trips)
    if all(curves):
        stages = [
            rising([(rows, seconds * blocks) for rows, seconds in curve])
            for blocks, curve in zip(spans, curves, strict=True)
        ]
    else:
        stages = [
            DecodeTimes(points=tuple((r, s * blocks / sum(spans)) for r, s in whole.points))
            for blocks in spans
        ]
    passes = [(rows, sum(stage.at(rows) for stage in stages)) for rows, _ in whole.points]
    share = min(
        (trip_s / pass_s for (_, trip_s), (_, pass_s) in zip(whole.points, passes, strict=True)
         if pass_s > 0),
        default=1.0,
    )  # fmt: skip
    share = min(1.0, share)
    ways = [
        (rows, max(0.0, trip_s - share * pass_s))
        for (rows, trip_s), (_, pass_s) in zip(whole.points, passes, strict=True)
    ]
    times = RingTimes(stages=tuple(stages), hops=rising(ways)).scaled([share] * len(stages))
    return replace(times, stages=(*times.stages, head))


def moved_times(
    times: RingTimes,
    before: Sequence[int],
    spans: Sequence[int],
    curves: Sequence[Sequence[tuple[int, float]]],
) -> RingTimes:
    """A ring whose blocks were dealt out anew, before anything is measured again.

    Args:
        times: of the ring until now; its last stage is the head.
        before: blocks of each of its other stages.
        spans: blocks of each stage now.
        curves: (rows, seconds through one block) of each; empty: as the blocks took on average.
    """
    known = sorted({rows for stage in times.stages[:-1] for rows, _ in stage.points})
    mean = [
        (rows, sum(stage.at(rows) for stage in times.stages[:-1]) / sum(before)) for rows in known
    ]
    stages = [
        rising([(rows, seconds * blocks) for rows, seconds in curve or mean])
        for blocks, curve in zip(spans, curves, strict=True)
    ]
    return replace(times, stages=(*stages, times.stages[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What is known where slots leave."""

    waiting: int
    """Samples whose next row may go."""
    samples: int
    """Samples that decode, those that wait among them."""
    away_s: tuple[float, ...] = ()
    """How long each slot that has not come back is away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """What may leave now."""

    rows: int
    again_s: float | None = None
    """Look again after so long, even if nothing comes back."""


def departing(slots: Slots, gate: Gate) -> Departure:
    """How many of the samples that wait leave now, as one slot."""
    if not gate.waiting:
        return Departure(rows=0)
    away = [age_s for age_s in gate.away_s if slots.hold_s - age_s > CLOCK_STEP_S]
    if len(away) >= slots.count:
        return Departure(rows=0, again_s=slots.hold_s - max(away))
    since_s = min(away, default=slots.gap_s)
    if slots.gap_s - since_s > CLOCK_STEP_S:
        return Departure(rows=0, again_s=slots.gap_s - since_s)
    return Departure(rows=min(gate.waiting, slots.rows(gate.samples)))


def choose_chunk_rows(prefill_s_per_row: float, pass_s: float) -> int:
    """Rows per chunk of a prompt: what takes no longer than a pass of decode rows.

    So a prompt that comes in at most halves the speed of the others, for as many passes as it
    has chunks. `prefill_s_per_row` is of the slowest stage; 0: not known, the smallest.
    """
    if prefill_s_per_row <= 0:
        return CHUNK_ROWS[-1]
    fitting = [rows for rows in CHUNK_ROWS if rows * prefill_s_per_row <= pass_s]
    return fitting[0] if fitting else CHUNK_ROWS[-1]


def samples_at_once(cache_tokens: Sequence[int], tokens_each: int, page_tokens: int) -> int:
    """Samples whose whole length fits into the smallest of the stages' caches; 0: not even one."""
    pages_each = -(-tokens_each // page_tokens)
    return min(tokens // page_tokens for tokens in cache_tokens) // pages_each
