"""A peer's own place in the space of round trips, kept from what it measures.

`shoal.plan.coordinates` has the rule for one sample. Here is what is remembered: a few round
trips to each of the last peers, so that a slow one (a busy loop, a lost packet) counts for
little, and so that old peers still hold us in place when neighbours change.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Final

from shoal.base.ids import PeerId
from shoal.plan.coordinates import (
    NOWHERE,
    STEP_FAR_OFF_S_MAX,
    STEP_S_MAX,
    Coordinate,
    Sample,
    far_off,
    fit,
    nudge,
)
from shoal.wire import fields as wire

PEERS_KEPT: Final = 32
"""Peers whose round trips are remembered. With those of 6 neighbours alone estimates are wrong
by 14 % on PlanetLab's round trips, with 32 by 10 %."""

ROUND_TRIPS_KEPT: Final = 3
"""Of each; the middle one counts."""

REPLAYS: Final = 3
"""Remembered peers that count again with each new round trip."""

FIT_PEERS: Final = 8
"""While fewer are known, all count at once: enough for an error of 10 %."""


class Locator:
    """Where we are.

    Args:
        rng: the direction in which we leave a point where somebody else is.
        where: what a peer says of its own place now; None: nothing.
    """

    def __init__(self, rng: random.Random, where: Callable[[PeerId], Coordinate | None]) -> None:
        self._rng = rng
        self._where = where
        self._coordinate = NOWHERE
        self._round_trips: dict[PeerId, deque[float]] = {}
        """The one measured last comes last."""
        self._turn = 0

    @property
    def coordinate(self) -> Coordinate:
        """Ours now; `NOWHERE` until something was measured."""
        return self._coordinate

    def measured(self, peer: PeerId, rtt_s: float) -> None:
        """A round trip to a peer took so long."""
        kept = self._round_trips
        trips = kept.pop(peer, None)
        is_new = trips is None
        trips = trips or deque(maxlen=ROUND_TRIPS_KEPT)
        trips.append(rtt_s)
        kept[peer] = trips
        if len(kept) > PEERS_KEPT:
            del kept[next(iter(kept))]
        if is_new and len(kept) <= FIT_PEERS:
            self._coordinate = fit([*self._samples().values()], self._rng)
            return
        samples = self._samples()
        are_odd = far_off(self._coordinate, [*samples.values()])
        odd = {one for one, is_odd in zip(samples, are_odd, strict=True) if is_odd}
        for one in [peer, *self._next_replayed()]:
            if one in samples:
                step_s = STEP_FAR_OFF_S_MAX if one in odd else STEP_S_MAX
                self._coordinate = nudge(self._coordinate, samples[one], self._rng, step_s)

    def _next_replayed(self) -> list[PeerId]:
        """All remembered peers in turns."""
        peers = [*self._round_trips]
        start, self._turn = self._turn, self._turn + REPLAYS
        return [peers[turn % len(peers)] for turn in range(start, start + min(REPLAYS, len(peers)))]

    def _samples(self) -> dict[PeerId, Sample]:
        """What is remembered, of peers that say where they are."""
        found = {}
        for peer, trips in self._round_trips.items():
            there = self._where(peer)
            if there is not None:
                found[peer] = Sample(there=there, rtt_s=median(trips))
        return found


def to_wire(one: Coordinate | None) -> wire.Coordinate | None:
    """As it travels."""
    if one is None:
        return None
    return wire.Coordinate(list(one.point), one.height, one.error)


def from_wire(one: wire.Coordinate | None) -> Coordinate | None:
    """As decisions see it; whether it makes sense is for them to judge (`is_sound`)."""
    if one is None:
        return None
    return Coordinate(point=tuple(one.point), height=one.height, error=one.error)
