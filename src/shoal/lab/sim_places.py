"""Coordinates of simulated servers: what theirs are after a while of measuring each other.

By the rule that real servers follow (`shoal.plan.coordinates`), on the problem's round trips,
without the gossip around it: fidelity C begins with a swarm that has been there for some time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from shoal.plan.coordinates import NOWHERE, Coordinate, Sample, nudge

ROUNDS: Final = 60
"""So often each measures some others: 15 minutes of real gossip."""

ASKED: Final = 6
"""Others that a server measures in a round: as many as it has neighbours."""


def settled_places(
    rtt_s: Sequence[Sequence[float]], rng: random.Random
) -> tuple[Coordinate | None, ...]:
    """Where servers with these round trips, in seconds, say that they are; None: alone."""
    numbers = range(len(rtt_s))
    if len(numbers) < 2:
        return (None,) * len(numbers)
    places = [NOWHERE for _ in numbers]
    for _ in range(ROUNDS):
        for one in numbers:
            others = [other for other in numbers if other != one]
            for other in rng.sample(others, min(ASKED, len(others))):
                sample = Sample(there=places[other], rtt_s=rtt_s[one][other])
                places[one] = nudge(places[one], sample, rng)
    return tuple(places)
