"""Where servers and clients are, and the round trips that follow: [links], `site`, `at`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.cli.plan_reader import Table
from shoal.plan.distance import STRETCH, Position, fibre_rtt_s

SITE_RTT_MS: Final = 0.5
"""Within one site: a switch and two network stacks."""

LAST_MILE_MS: Final = 5.0
"""From a home to its provider and back; each end of a link between places adds its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server or a client."""

    name: str
    table: Table
    group: str = ""
    """The name that its table has, when the table stands for several."""
    site: str | None = None
    position: Position | None = None
    last_mile_s: float = 0.0

    @property
    def called(self) -> tuple[str, ...]:
        """What pairs may call it, the closest name first."""
        return tuple(word for word in (self.name, self.group, self.site) if word)

    def placed(self, positions: Mapping[str, Position]) -> Endpoint:
        """With its site's position if it has none of its own."""
        if self.position is not None or self.site is None:
            return self
        return replace(self, position=positions.get(self.site))


def site_positions(ends: Iterable[Endpoint]) -> dict[str, Position]:
    """Where sites are: where the first in each says that it is."""
    found: dict[str, Position] = {}
    for end in ends:
        if end.site is not None and end.position is not None:
            found.setdefault(end.site, end.position)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The rules for round trips."""

    pairs: dict[frozenset[str], tuple[float, Table]]
    rtt_ms: float | None
    site_rtt_s: float
    stretch: float
    last_mile_ms: float
    link_bytes_per_s: float
    used: set[str] = field(default_factory=set)
    """`position` once some round trip came from one."""

    @property
    def has_positions(self) -> bool:
        """Whether any round trip was reckoned from a distance."""
        return "position" in self.used

    def check_names(self, ends: Sequence[Endpoint]) -> None:
        """See that pairs name somebody.

        Raises:
            ConfigError: one does not.
        """
        known = {word for end in ends for word in end.called}
        for names, (_, table) in self.pairs.items():
            for name in sorted(names - known):
                raise table.fail(f"no server, client or site is called {name!r}", "between")

    def rtt_s(self, one: Endpoint, other: Endpoint) -> float:
        """The round trip between two ends, seconds: as named, by site, by distance, or any.

        Raises:
            ConfigError: nothing says.
        """
        if one is other:
            return 0.0
        for mine in one.called:
            for theirs in other.called:
                found = self.pairs.get(frozenset((mine, theirs)))
                if found is not None:
                    return found[0]
        if one.site is not None and one.site == other.site:
            return self.site_rtt_s
        if one.position is not None and other.position is not None:
            self.used.add("position")
            way_s = fibre_rtt_s(one.position, other.position, stretch=self.stretch)
            return way_s + one.last_mile_s + other.last_mile_s
        if self.rtt_ms is not None:
            return self.rtt_ms / 1e3
        raise one.table.fail(
            f"no round trip is known between {one.name} and {other.name}: set rtt_ms in [links] "
            "for all pairs, give both a position (at = [latitude, longitude]) or one site, or "
            "name them in [[links.pairs]]"
        )


def read_places(table: Table) -> Places:
    """[links], but for what is no round trip.

    Raises:
        ConfigError: nonsense, with its line.
    """
    rtt_ms = table.number("rtt_ms", high=1e5) if "rtt_ms" in table else None
    table.asked.add("rtt_ms")
    pairs: dict[frozenset[str], tuple[float, Table]] = {}
    for pair in table.tables("pairs"):
        names = frozenset(pair.words("between", 2))
        if names in pairs:
            raise pair.fail("this pair was given before", "between")
        pairs[names] = (pair.number("rtt_ms", high=1e5) / 1e3, pair)
        pair.done()
    return Places(
        pairs=pairs,
        rtt_ms=rtt_ms,
        site_rtt_s=table.number("site_rtt_ms", SITE_RTT_MS, high=1e5) / 1e3,
        stretch=table.number("stretch", STRETCH, low=1.0, high=10.0),
        last_mile_ms=table.number("last_mile_ms", LAST_MILE_MS, high=1e4),
        link_bytes_per_s=table.rate("rate", math.inf),
    )


def read_endpoint(table: Table, name: str, places: Places) -> Endpoint:
    """Where a server or client is.

    Raises:
        ConfigError: nonsense, with its line.
    """
    degrees = table.numbers("at", 2)
    position = None
    if degrees is not None:
        try:
            position = Position(*degrees)
        except ConfigError as error:
            raise table.checked("at", error) from error
    site = table.text("site") if "site" in table else None
    table.asked.add("site")
    mile_ms = table.number("last_mile_ms", places.last_mile_ms, high=1e4)
    is_client = table.path[:1] == ("clients",)
    if is_client:
        name = table.text("name", name)
        table.done()
    return Endpoint(name=name, table=table, site=site, position=position, last_mile_s=mile_ms / 1e3)
