"""Round trips of links that nobody has measured: from coordinates, or positions on the globe.

Light in fibre covers 200 km per millisecond, and cables do not run straight. (Maps of
networks in papers are often three times faster than light: see our notes on BPRR.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final

from shoal.base.errors import ConfigError
from shoal.plan.coordinates import Coordinate, estimate_s
from shoal.plan.cost import RTT_UNKNOWN_S

EARTH_KM: Final = 6371.0
FIBRE_KM_PER_S: Final = 200_000.0

STRETCH: Final = 1.5
"""How much longer a cable is than the great circle; 1.3 to 2 are usual."""

ESTIMATED_MAX: Final = 200
"""Places of which all pairs are estimated: a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Position:
    """Degrees north and east."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        if not (-90 <= self.latitude <= 90 and -180 <= self.longitude <= 180):
            raise ConfigError(
                f"[{self.latitude}, {self.longitude}] is no position: write [latitude, longitude] "
                "in degrees, -90 to 90 and -180 to 180"
            )


def likely_rtt_s(
    measured_s: float | None, one: Coordinate | None, other: Coordinate | None
) -> float:
    """Seconds there and back: as measured, or as coordinates say, or `RTT_UNKNOWN_S`."""
    if measured_s is not None:
        return measured_s
    estimated_s = estimate_s(one, other)
    return RTT_UNKNOWN_S if estimated_s is None else estimated_s


def nearest(
    places: Sequence[Coordinate | None], most: int
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """For each place the `most` nearest others, as (index, estimated round trip in seconds).

    Fewer where coordinates don't tell, none beyond `ESTIMATED_MAX` places: all pairs are tried.
    """
    if len(places) > ESTIMATED_MAX:
        return ((),) * len(places)
    found = []
    for mine, one in enumerate(places):
        trips = ((number, estimate_s(one, other)) for number, other in enumerate(places))
        known = [(number, s) for number, s in trips if s is not None and number != mine]
        found.append(tuple(nsmallest(most, known, key=lambda pair: (pair[1], pair[0]))))
    return tuple(found)


def distance_km(one: Position, other: Position) -> float:
    """Along the great circle (haversine)."""
    latitudes = math.radians(one.latitude), math.radians(other.latitude)
    half_north = (latitudes[1] - latitudes[0]) / 2
    half_east = math.radians(other.longitude - one.longitude) / 2
    chord = (
        math.sin(half_north) ** 2
        + math.cos(latitudes[0]) * math.cos(latitudes[1]) * math.sin(half_east) ** 2
    )
    return 2 * EARTH_KM * math.asin(math.sqrt(min(1.0, chord)))


def fibre_rtt_s(one: Position, other: Position, *, stretch: float = STRETCH) -> float:
    """Seconds there and back through fibre `stretch` times as long as the great circle."""
    return 2 * distance_km(one, other) * stretch / FIBRE_KM_PER_S
