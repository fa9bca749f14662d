"""Whom a peer keeps in touch with: decisions over a frozen picture, nothing else.

Each server dials a few others that it picks at random and is dialled by as many: the
streams between them form a random graph that stays connected when many vanish at once,
and in which everybody is a handful of hops away. Clients dial two and are never dialled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.ids import PeerId

SERVER_DIALS: Final = 3
"""Neighbours that a server dials. As many dial it on average, so each is watched by six:
all of them failing together is rare, and a flood crosses 1,000 peers in about five hops."""

READER_DIALS: Final = 2
"""Neighbours that a client dials: one alone could hide servers from it."""

DIALS_AT_ONCE: Final = 4
"""Dials under way: each is a burst of public-key work."""

MEMBERS_IN_MAX: Final = 16
"""Servers that may keep in touch by dialling us; three do on average."""

READERS_IN_MAX: Final = 256
"""Clients that may read from us; each costs about as much traffic as a neighbour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourView:
    """One open gossip stream."""

    peer: PeerId
    is_dialled: bool
    """By us; otherwise by the other side."""
    is_member: bool
    """Whether the peer has a record, so is a server."""
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What decisions about neighbours are made from."""

    is_reader: bool
    neighbours: tuple[NeighbourView, ...]
    num_dialling: int = 0

    @property
    def num_dialled(self) -> int:
        """Streams that we opened."""
        return sum(one.is_dialled for one in self.neighbours)

    @property
    def num_missing(self) -> int:
        """How many more to dial now."""
        missing = num_wanted(self.is_reader) - self.num_dialled - self.num_dialling
        return max(0, min(missing, DIALS_AT_ONCE - self.num_dialling))


def num_wanted(is_reader: bool) -> int:
    """Streams that a peer ought to open."""
    return READER_DIALS if is_reader else SERVER_DIALS


def choose_dials(
    around: Surroundings, candidates: Sequence[PeerId], rng: random.Random
) -> list[PeerId]:
    """Whom to dial now; `candidates` are servers that could be."""
    return rng.sample(candidates, min(around.num_missing, len(candidates)))


def choose_surplus(around: Surroundings) -> PeerId | None:
    """Whom to part from: the longest known of those dialled, if there is one too many.

    The newest stays: it may be the only bridge to another half of the swarm.
    """
    dialled = [one for one in around.neighbours if one.is_dialled]
    if len(dialled) <= num_wanted(around.is_reader):
        return None
    return min(dialled, key=lambda one: (one.since_s, one.peer)).peer


def admits(around: Surroundings, is_member: bool) -> bool:
    """Whether one more peer may keep in touch by dialling us."""
    same = sum(not one.is_dialled and one.is_member == is_member for one in around.neighbours)
    return same < (MEMBERS_IN_MAX if is_member else READERS_IN_MAX)


def prefers_new(me: PeerId, peer: PeerId, old_is_dialled: bool, new_is_dialled: bool) -> bool:
    """Which of two streams with one peer stays: both sides must come to the same answer.

    Two that dialled each other keep the stream of the lower peer id. A second stream of
    the same direction means that the dialler lost the first.
    """
    if old_is_dialled == new_is_dialled:
        return True
    return new_is_dialled == (me < peer)
