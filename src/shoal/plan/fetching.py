"""Who sends which weights: decided anew whenever a peer has nothing to do.

One tensor comes from one peer at a time, so wrong bytes have one author. Rare tensors go
first (whoever holds them may leave), begun ones before others, large ones before small ones.
At the end an idle peer takes over from a slow one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shoal.base.ids import PeerId

BATCH_BYTES: Final = 8 << 20
"""Small tensors are asked for together up to this: norms cost no round trip each."""

BATCH_ITEMS: Final = 64
"""Tensors asked for together: each has an open file."""

TAKEOVER_FACTOR: Final = 2.0
"""Whoever takes over must be done in less than the other's time divided by this; else two
peers of equal speed would take from each other for ever."""

TAKEOVER_MIN_S: Final = 5.0
"""A rest that is done sooner stays where it is, and so does a flight younger than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A tensor or file that is still to be fetched and that nobody sends now."""

    content: bytes
    left_bytes: int
    is_begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """What one peer is sending."""

    peer: PeerId
    contents: tuple[bytes, ...]
    left_bytes: int
    bytes_per_s: float
    """Measured in this flight; 0: nothing came yet."""
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchView:
    """A download at one moment."""

    wanted: tuple[Wanted, ...]
    holders: Mapping[PeerId, frozenset[bytes]]
    """What each peer that is in use holds."""
    flights: tuple[Flight, ...] = ()


def choose_batch(view: FetchView, peer: PeerId) -> tuple[bytes, ...]:
    """What an idle peer should send next, in order: up to BATCH_BYTES, or one tensor."""
    held = view.holders.get(peer, frozenset())
    mine = [one for one in view.wanted if one.content in held]
    mine.sort(key=lambda one: (
        _num_holders(view, one.content), not one.is_begun, -one.left_bytes, one.content
    ))  # fmt: skip
    batch: list[bytes] = []
    left = BATCH_BYTES
    for one in mine:
        if batch and one.left_bytes > left:
            continue
        batch.append(one.content)
        left -= one.left_bytes
        if left <= 0 or len(batch) == BATCH_ITEMS:
            break
    return tuple(batch)


def choose_takeover(view: FetchView, peer: PeerId, bytes_per_s: float) -> PeerId | None:
    """Whose flight an idle peer with this speed should take over; None: nobody's.

    Only when nothing is left to choose from: the slowest flight that `peer` could finish
    much sooner, and all of which it holds.
    """
    if bytes_per_s <= 0:
        return None
    held = view.holders.get(peer, frozenset())
    best: tuple[float, PeerId] | None = None
    for flight in view.flights:
        if flight.age_s < TAKEOVER_MIN_S:
            continue  # too young to be judged
        if flight.peer == peer or not held.issuperset(flight.contents):
            continue
        rest_s = flight.left_bytes / flight.bytes_per_s if flight.bytes_per_s else float("inf")
        own_s = flight.left_bytes / bytes_per_s
        if rest_s <= TAKEOVER_MIN_S or own_s * TAKEOVER_FACTOR > rest_s:
            continue
        if best is None or rest_s > best[0]:
            best = (rest_s, flight.peer)
    return None if best is None else best[1]


def files_on_offer(offers: Mapping[PeerId, str]) -> dict[str, list[PeerId]]:
    """Which sets of side files (by name) are offered, and by whom; most peers first."""
    by_name: dict[str, list[PeerId]] = {}
    for peer in sorted(offers):
        by_name.setdefault(offers[peer], []).append(peer)
    return dict(sorted(by_name.items(), key=lambda one: (-len(one[1]), one[0])))


def _num_holders(view: FetchView, content: bytes) -> int:
    return sum(content in held for held in view.holders.values())
