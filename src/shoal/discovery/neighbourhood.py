"""The neighbours that a peer has now, what they may still hand over, and what to do next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from shoal.base.ids import PeerId
from shoal.base.limits import RECORDS_MAX
from shoal.discovery.allowance import RECORDS_BURST, RECORDS_PER_S, Allowance
from shoal.discovery.directory import SignedRecord
from shoal.wire.gossip import RecordName
from shoal.wire.messages import Message

SUSPECTS_BURST: Final = 1024
"""Suspicions that one neighbour may pass on at once: a split swarm's other half."""

SUSPECTS_PER_S: Final = 8.0
"""And in the long run: a swarm of 4,096 that loses 10 % a minute loses 7 a second."""

WANTS_BURST: Final = 2 * RECORDS_MAX
"""Records that one neighbour may ask for at once: everything, and once more."""

WANTS_PER_S: Final = 50.0
"""And in the long run; more than the swarm can have news."""


@dataclass(frozen=True, slots=True)
class Send:
    """Say this to a neighbour."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a gossip stream; tell the Gossiper how it went."""

    peer: PeerId
    addresses: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the stream to a peer that is no neighbour any more; by a Part if it is `polite`."""

    peer: PeerId
    reason: str
    is_polite: bool


Action = Send | Dial | Drop


@dataclass(slots=True)
class Neighbour:
    """One open gossip stream."""

    peer: PeerId
    is_dialled: bool
    since_s: float
    heard_s: float
    sent_s: float
    records: Allowance
    suspects: Allowance
    wants: Allowance
    offered_s: float = float("-inf")
    pending: dict[PeerId, RecordName] = field(default_factory=dict)
    """News that it has not been offered yet."""
    warned_s: float = float("-inf")
    suspicions: dict[PeerId, RecordName] = field(default_factory=dict)
    """That it has not been told of yet."""
    ask: int = 0
    """What its next echo has to say; 0: nothing is asked."""
    asked_s: float = float("-inf")
    echoed_s: float = float("-inf")
    num_trips: int = 0
    """Round trips that were measured."""
    num_bad: int = 0
    """Records that an honest peer would not have handed on."""


def new_neighbour(peer: PeerId, now_s: float, *, is_dialled: bool) -> Neighbour:
    """A neighbour whose stream has just opened."""
    return Neighbour(
        peer=peer,
        is_dialled=is_dialled,
        since_s=now_s,
        heard_s=now_s,
        sent_s=now_s,
        records=Allowance(RECORDS_BURST, RECORDS_PER_S, now_s),
        suspects=Allowance(SUSPECTS_BURST, SUSPECTS_PER_S, now_s),
        wants=Allowance(WANTS_BURST, WANTS_PER_S, now_s),
    )


class Neighbourhood:
    """All neighbours, the actions that are due, and counters; shared by the rules."""

    def __init__(self) -> None:
        self.neighbours: dict[PeerId, Neighbour] = {}
        self.counts: Counter[str] = Counter()
        """What came of what was handed over: `news`, `repeated`, `stale`, `flood`, or the
        code of the error for which it was refused."""
        self._actions: list[Action] = []

    def send(self, peer: PeerId, message: Message, now_s: float) -> None:
        """Say something to a neighbour; nothing if it is none any more."""
        neighbour = self.neighbours.get(peer)
        if neighbour is not None:
            neighbour.sent_s = now_s
            self._actions.append(Send(peer, message))

    def do(self, action: Action) -> None:
        """Have something done."""
        self._actions.append(action)

    def take_actions(self) -> list[Action]:
        """What is due now, in order; it is then the caller's to do."""
        actions, self._actions = self._actions, []
        return actions


def name_of(signed: SignedRecord) -> RecordName:
    """The name of a record."""
    return RecordName(signed.record.peer, *signed.record.sequence)
