"""What the ways of a chain cost, as far as a client knows them.

A client has measured round trips to servers, not those between them. What it may reckon with
follows from the triangle of itself and the two: a way between servers takes no less than the
difference of both round trips, and no more than their sum, which is what it takes by way of the
client. Within these bounds coordinates tell (`shoal.plan.coordinates`); without them it is the
sum: such a chain costs what a hub's would.

So a server that lies about its place gains little. Around the loop the differences add up: no
chain with it counts as faster than the round trip to it that the client has measured itself
(and a chain is only taken after its servers were asked). A property test holds us to that.

Prices are those of `shoal.plan.cost`, for one decode step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from shoal.base.ids import PeerId
from shoal.plan.coordinates import Coordinate, estimate_s, is_sound
from shoal.plan.cost import RTT_UNKNOWN_S, VIA_CLIENT_S, hub_entry_s, push_entry_s
from shoal.plan.distance import likely_rtt_s
from shoal.plan.spec import Flow
from shoal.plan.view import Experience, ServerView

ROW_VALUE_BYTES: Final = 2
"""Of a value in a row: bfloat16 or float16, as most models travel."""

RATE_LEAST: Final = 1e6
"""Slower than this nobody counts as: a rate seen while TCP was starting slowly says more of the
way's length than of its width, and a row is a few packets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a client knows of where a server is."""

    rtt_s: float = RTT_UNKNOWN_S
    """From the client and back."""
    is_measured: bool = False
    """By the client; else it is an estimate, and bounds nothing."""
    coordinate: Coordinate | None = None
    sent_bytes_per_s: float = math.inf
    """At which its rows leave it."""


UNKNOWN: Final = Place()
"""Of a server that nobody has measured, and that says nothing."""


def place_of(server: ServerView, experience: Experience) -> Place:
    """Where a server is: measured, or by coordinates, or a continent away (`RTT_UNKNOWN_S`)."""
    said = server.coordinate
    there = said if said is not None and is_sound(said) else None
    measured_s = experience.rtt_s.get(server.peer, experience.hope_s)
    return Place(
        rtt_s=likely_rtt_s(measured_s, experience.coordinate, there),
        is_measured=server.peer in experience.rtt_s,
        coordinate=there,
        sent_bytes_per_s=trusted_rate(server.sent_bytes_per_s),
    )


def trusted_rate(said_bytes_per_s: float) -> float:
    """The rate at which a server sends, by what its record says; 0 there: no limit is known."""
    return max(said_bytes_per_s, RATE_LEAST) if said_bytes_per_s > 0 else math.inf


def row_bytes(hidden_size: int) -> int:
    """Bytes of a row on a way."""
    return hidden_size * ROW_VALUE_BYTES


def rtt_between_s(one: Place, other: Place) -> float:
    """Seconds between two servers and back: by coordinates, within the triangle's bounds."""
    most_s = one.rtt_s + other.rtt_s
    estimated_s = estimate_s(one.coordinate, other.coordinate)
    if estimated_s is None:
        return most_s
    if one.is_measured and other.is_measured:
        estimated_s = max(estimated_s, abs(one.rtt_s - other.rtt_s))
    return min(estimated_s, most_s)


class Entries(dict[PeerId | None, float]):
    """Seconds of getting to one server, by who sends; None: the client. Found when asked for."""

    def __init__(self, price: Callable[[PeerId | None], float]) -> None:
        super().__init__()
        self._price = price

    def __missing__(self, sender: PeerId | None) -> float:
        found = self[sender] = self._price(sender)
        return found


class Ways:
    """What it costs a client's session to get from hop to hop.

    Args:
        places: of servers; the others count as `UNKNOWN`.
        unreachable: (sender, receiver) pairs that are linked via the client.
        flow: `push`: servers send to each other. `hub`: every hop sends to the client, as in
            training.
        row_bytes: of what every hop sends at a step.
    """

    def __init__(
        self,
        places: Mapping[PeerId, Place],
        unreachable: frozenset[tuple[PeerId, PeerId]] = frozenset(),
        flow: Flow = "push",
        row_bytes: int = 0,
    ) -> None:
        self._places = places
        self._unreachable = unreachable
        self._flow = flow
        self._row_bytes = row_bytes
        self._entries: dict[PeerId, Entries] = {}

    @property
    def have_gaps(self) -> bool:
        """Whether there are servers that can't reach each other."""
        return bool(self._unreachable)

    def entries(self, receiver: PeerId) -> Entries:
        """Seconds of getting to a server, by who sends."""
        found = self._entries.get(receiver)
        if found is None:
            found = self._entries[receiver] = Entries(partial(self._entry_s, receiver))
        return found

    def leave_s(self, sender: PeerId, receiver: PeerId | None) -> float:
        """Seconds of what the last hop sends: to the client (None), or to who comes after."""
        if receiver is not None:
            return self.entries(receiver)[sender]
        if self._flow == "hub":
            return 0.0
        last = self._places.get(sender, UNKNOWN)
        return last.rtt_s / 2 + self._transfer_s(last)

    def _entry_s(self, receiver: PeerId, sender: PeerId | None) -> float:
        there = self._places.get(receiver, UNKNOWN)
        if self._flow == "hub":
            return hub_entry_s(there.rtt_s, transfer_s=self._transfer_s(there) / 2)
        if sender is None:
            return push_entry_s(there.rtt_s)
        if sender == receiver:
            return push_entry_s(0.0)
        here = self._places.get(sender, UNKNOWN)
        if (sender, receiver) in self._unreachable:
            rtt_s = here.rtt_s + there.rtt_s
            return push_entry_s(rtt_s, transfer_s=self._transfer_s(here)) + VIA_CLIENT_S
        return push_entry_s(rtt_between_s(here, there), transfer_s=self._transfer_s(here))

    def _transfer_s(self, sender: Place) -> float:
        """Until a row has left."""
        return self._row_bytes / sender.sent_bytes_per_s


def ways_of(
    servers: Iterable[ServerView], experience: Experience, flow: Flow = "push", hidden_size: int = 0
) -> Ways:
    """The ways of a client that has this experience, for rows of `hidden_size` values.

    Who is in no view, but was measured, is as far away as measured.
    """
    places = {
        peer: Place(rtt_s=rtt_s, is_measured=True) for peer, rtt_s in experience.rtt_s.items()
    }
    places.update((one.peer, place_of(one, experience)) for one in servers)
    return Ways(places, experience.unreachable_pairs, flow, row_bytes(hidden_size))
