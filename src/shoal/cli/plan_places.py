"""Where servers and clients are, and the round trips that follow: [links], `site`, `at`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.cli.plan_reader import Table
from shoal.plan.distance import STRETCH, Position, fibre_rtt_s
from shoal.plan.spec import Flow

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
    def is_client(self) -> bool:
        """Not a server."""
        return self.table.path[:1] == ("clients",)

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
class Pair:
    """What a file says of two ends; None: nothing."""

    rtt_s: float | None
    bytes_per_s: float | None
    table: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The rules for round trips, and for what the ways between servers carry."""

    table: Table
    pairs: dict[frozenset[str], Pair]
    rtt_ms: float | None
    site_rtt_s: float
    stretch: float
    last_mile_ms: float
    link_bytes_per_s: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    between_bytes_per_s: float | None
    """Of a way from one site to another; None: as much as their links."""
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
        served = {word for end in ends if not end.is_client for word in end.called}
        for names, pair in self.pairs.items():
            for name in sorted(names - known):
                raise pair.table.fail(f"no server, client or site is called {name!r}", "between")
            if pair.bytes_per_s is not None and not names <= served:
                text = "rates are for ways between servers; a client's is not reckoned with"
                raise pair.table.fail(text, "rate")

    def rtt_s(self, one: Endpoint, other: Endpoint) -> float:
        """The round trip between two ends, seconds: as named, by site, by distance, or any.

        Raises:
            ConfigError: nothing says.
        """
        if one is other:
            return 0.0
        for pair in self._pairs_of(one, other):
            if pair.rtt_s is not None:
                return pair.rtt_s
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

    def bytes_per_s(
        self, ends: Sequence[Endpoint], flow: Flow
    ) -> tuple[tuple[float, ...], ...] | None:
        """What the way from each server to each other one carries; None: nothing is said.

        Raises:
            ConfigError: something is, but all goes by way of the client.
        """
        said = [(pair.table, "rate") for pair in self.pairs.values() if pair.bytes_per_s]
        if self.between_bytes_per_s:
            said.append((self.table, "between_rate"))
        if not said:
            return None
        if flow == "hub":
            table, key = said[0]
            text = 'servers send to each other with flow = "push" only; leave this out, or that'
            raise table.fail(text, key)
        # Nobody sends to itself: what is said there only shows who is like whom.
        return tuple(tuple(self._bytes_per_s(one, other) for other in ends) for one in ends)

    def _bytes_per_s(self, one: Endpoint, other: Endpoint) -> float:
        for pair in self._pairs_of(one, other):
            if pair.bytes_per_s is not None:
                return pair.bytes_per_s
        is_near = one.site is not None and one.site == other.site
        return math.inf if is_near else self.between_bytes_per_s or math.inf

    def _pairs_of(self, one: Endpoint, other: Endpoint) -> Iterator[Pair]:
        """Those that mean these two, the closest names first."""
        for mine in one.called:
            for theirs in other.called:
                found = self.pairs.get(frozenset((mine, theirs)))
                if found is not None:
                    yield found


def read_places(table: Table) -> Places:
    """[links], but for what is no round trip.

    Raises:
        ConfigError: nonsense, with its line.
    """
    rtt_ms = table.number("rtt_ms", high=1e5) if "rtt_ms" in table else None
    table.asked.add("rtt_ms")
    pairs: dict[frozenset[str], Pair] = {}
    for pair in table.tables("pairs"):
        names = frozenset(pair.words("between", 2))
        if names in pairs:
            raise pair.fail("this pair was given before", "between")
        pairs[names] = _read_pair(pair)
    return Places(
        table=table,
        pairs=pairs,
        rtt_ms=rtt_ms,
        site_rtt_s=table.number("site_rtt_ms", SITE_RTT_MS, high=1e5) / 1e3,
        stretch=table.number("stretch", STRETCH, low=1.0, high=10.0),
        last_mile_ms=table.number("last_mile_ms", LAST_MILE_MS, high=1e4),
        link_bytes_per_s=table.rate("rate", math.inf),
        uplink_bytes_per_s=table.rate("uplink", math.inf),
        downlink_bytes_per_s=table.rate("downlink", math.inf),
        between_bytes_per_s=_rate(table, "between_rate"),
    )


def _read_pair(table: Table) -> Pair:
    if "rate" in table and "rtt_ms" not in table:
        table.asked.add("rtt_ms")
        rtt_s = None
    else:
        rtt_s = table.number("rtt_ms", high=1e5) / 1e3
    pair = Pair(rtt_s=rtt_s, bytes_per_s=_rate(table, "rate"), table=table)
    table.done()
    return pair


def _rate(table: Table, key: str) -> float | None:
    table.asked.add(key)
    return table.rate(key) if key in table else None


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
