"""The record store: the latest valid record of each peer, and nothing that has expired.

Pure: time is handed in, in seconds of any clock that never goes back. Not here: where
records come from, and whom they are handed on to.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import PeerBusy, PeerRefused
from shoal.base.ids import PeerId, short
from shoal.base.limits import RECORD_TTL_S, RECORDS_MAX
from shoal.discovery.digest import RunningDigest
from shoal.discovery.directory import SignedRecord, Snapshot
from shoal.discovery.records import Record, open_record

REMEMBERED_MAX: Final = 4 * RECORDS_MAX
"""Expired peers whose last sequence is remembered, so that an old copy of a dead peer's
record, handed round among others, does not come back to life here."""

LOST_MAX: Final = RECORDS_MAX
"""Servers that vanished without a farewell whose records are kept aside, to dial them now
and then: that is how the halves of a split swarm find each other again."""

RESTORE_AFTER_S: Final = 30.0
"""Whoever still holds a server this long after we dropped it as a suspect was not reached by
the suspicion, so lived in another half of a split swarm: it may be right. Sooner it is
behind, and must be told."""

SUSPECT_S: Final = 5.0
"""A suspect has this long to refute: a flood there and back over six hops takes about 3 s."""

Opener = Callable[[bytes], Record]
"""Checks an envelope; `records.open_record`, or a simulation's that remembers."""


@dataclass(slots=True)
class _Held:
    signed: SignedRecord
    born_s: float
    """When it was signed, by our clock, as far as those who handed it on told the truth."""
    expires_s: float

    @property
    def is_tombstone(self) -> bool:
        return self.signed.record.state == "offline"

    @property
    def sequence(self) -> tuple[int, int]:
        return self.signed.record.sequence


@dataclass(frozen=True, slots=True)
class _Lost:
    held: _Held
    since_s: float


class RecordStore:
    """The records of one swarm.

    Args:
        swarm: records of other swarms are refused.
        is_lasting: records never expire; for fixed clusters, where a person vouches.
        records_max: peers that are held at once, those who have gone included.
        opener: checks records.
    """

    def __init__(
        self,
        swarm: str,
        *,
        is_lasting: bool = False,
        records_max: int = RECORDS_MAX,
        opener: Opener = open_record,
    ) -> None:
        self.swarm = swarm
        self.version = 0
        """Rises with every change of the snapshot."""
        self._is_lasting = is_lasting
        self._records_max = records_max
        self._open = opener
        self.digest = RunningDigest()
        self._held: dict[PeerId, _Held] = {}
        self._envelopes: set[bytes] = set()
        self._expired: OrderedDict[PeerId, tuple[int, int]] = OrderedDict()
        self._lost: OrderedDict[PeerId, _Lost] = OrderedDict()
        self._suspects: dict[PeerId, float] = {}
        """Until when they may refute."""
        self._soonest_s = math.inf
        """Nothing expires before; what does expire may do so later."""
        self._snapshot = Snapshot(version=0)
        self._listeners: list[Callable[[], None]] = []
        self._news_listeners: list[Callable[[SignedRecord], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the snapshot."""
        self._listeners.append(listener)

    def on_news(self, listener: Callable[[SignedRecord], None]) -> None:
        """Call `listener` with every record that is taken, tombstones too."""
        self._news_listeners.append(listener)

    def accept(self, data: bytes, now_s: float, age_s: float = 0.0) -> bool:
        """Take a record from anybody; whether it was news.

        A record with the sequence of the one we hold, or a lower one, is not news, and
        never makes it valid for longer. `age_s` of its life is over: without that a
        dead server's record would begin a new life wherever it is handed on to. Ages are
        as honest as those who state them; none makes a record live longer than its own
        lifetime from its receipt here.

        Raises:
            ProtocolError: malformed, too large, or not signed by its peer.
            PeerMisbehaved: the peer signed what can't be.
            PeerRefused: of another swarm.
            PeerBusy: the store is full.
        """
        self.expire(now_s)
        if data in self._envelopes:  # the usual case, and no signature to check
            return False
        record = self._open(data)
        peer = PeerId(record.peer)
        if record.swarm != self.swarm:
            raise PeerRefused(
                f"a record of {short(peer)} is of swarm {record.swarm!r}, not {self.swarm!r}"
            )
        known = self.sequence(peer)
        if known is not None and record.sequence <= known:
            return False
        if not self._is_lasting and age_s >= min(record.ttl_s, RECORD_TTL_S):
            return False
        if peer not in self._held:
            self._make_room(now_s)
        signed = SignedRecord(record=record, data=data)
        self._take(peer, signed, now_s, age_s)
        for listener in self._news_listeners:
            listener(signed)
        return True

    def find(self, peer: PeerId) -> SignedRecord | None:
        """The peer's latest record, tombstones too."""
        held = self._held.get(peer)
        return None if held is None else held.signed

    def sequence(self, peer: PeerId) -> tuple[int, int] | None:
        """The highest sequence that we saw of a peer and still remember."""
        held = self._held.get(peer)
        if held is not None:
            return held.signed.record.sequence
        return self._expired.get(peer)

    def suspect(self, peer: PeerId, sequence: tuple[int, int], now_s: float) -> bool:
        """Somebody can't reach a server whose record we hold; whether that is news.

        Unless a later record comes within SUSPECT_S it is dropped. An accusation that
        names another sequence than ours is about another life of that server.
        """
        self.expire(now_s)
        held = self._held.get(peer)
        if held is None or held.is_tombstone or held.sequence != sequence or self._is_lasting:
            return False
        if peer in self._suspects:
            return False
        self._suspects[peer] = now_s + SUSPECT_S
        self._soonest_s = min(self._soonest_s, now_s + SUSPECT_S)
        self._change()
        return True

    def is_suspect(self, peer: PeerId) -> bool:
        """Whether the peer is accused of being gone and may still refute."""
        return peer in self._suspects

    def suspects(self) -> tuple[SignedRecord, ...]:
        """The records of those who are accused of being gone and may still refute."""
        return tuple(self._held[peer].signed for peer in self._suspects)

    def lost(self) -> tuple[PeerId, ...]:
        """Servers that vanished without a farewell, the latest last."""
        return tuple(self._lost)

    def find_lost(self, peer: PeerId) -> SignedRecord | None:
        """The last record of a server that vanished without a farewell."""
        lost = self._lost.get(peer)
        return None if lost is None else lost.held.signed

    def restore(self, peer: PeerId, now_s: float) -> bool:
        """Take a suspect back, because somebody still holds its record; whether we do.

        Only RESTORE_AFTER_S after it was dropped, and for what is left of its life.
        """
        lost = self._lost.get(peer)
        if lost is None or lost.held.expires_s <= now_s:
            return False
        if now_s - lost.since_s < RESTORE_AFTER_S or len(self._held) >= self._records_max:
            return False
        self._hold(peer, lost.held)
        for listener in self._news_listeners:
            listener(lost.held.signed)
        return True

    def expire(self, now_s: float) -> None:
        """Drop what is no longer valid, and suspects that did not refute in time."""
        if now_s < self._soonest_s:
            return
        expired = [peer for peer, held in self._held.items() if held.expires_s <= now_s]
        expired += [peer for peer, end_s in self._suspects.items() if end_s <= now_s]
        changes = [self._drop(peer, now_s) for peer in expired if peer in self._held]
        self._soonest_s = self.next_expiry_s
        if any(changes):
            self._change()

    @property
    def next_expiry_s(self) -> float:
        """When the next record expires or is dropped; infinity if none is."""
        ends_s = [held.expires_s for held in self._held.values()]
        return min([*ends_s, *self._suspects.values()], default=math.inf)

    def age_s(self, peer: PeerId, now_s: float) -> float:
        """How much of the life of the peer's record is over, to hand on with it."""
        held = self._held.get(peer)
        return 0.0 if held is None else max(0.0, now_s - held.born_s)

    def snapshot(self) -> Snapshot:
        """All servers, by peer id; valid as of the last call that was handed the time."""
        if self._snapshot.version != self.version:
            here = [held.signed for held in self._held.values() if not held.is_tombstone]
            here.sort(key=lambda signed: signed.record.peer)
            self._snapshot = Snapshot(
                version=self.version, records=tuple(here), suspects=frozenset(self._suspects)
            )
        return self._snapshot

    def envelopes(self, after: bytes = b"") -> Iterator[tuple[PeerId, bytes]]:
        """What to hand on, tombstones too, in the order of peer ids, behind `after`."""
        for peer in sorted(peer for peer in self._held if peer > after):
            yield peer, self._held[peer].signed.data

    def sequences(self) -> Iterator[tuple[PeerId, tuple[int, int]]]:
        """Whose records are held, tombstones too, and their sequences."""
        for peer, held in self._held.items():
            yield peer, held.sequence

    def _take(self, peer: PeerId, signed: SignedRecord, now_s: float, age_s: float) -> None:
        ttl_s = math.inf if self._is_lasting else min(signed.record.ttl_s, RECORD_TTL_S)
        born_s = now_s - min(age_s, RECORD_TTL_S)
        self._hold(peer, _Held(signed, born_s, born_s + ttl_s))

    def _hold(self, peer: PeerId, held: _Held) -> None:
        before = self._held.get(peer)
        if before is not None:
            self._envelopes.discard(before.signed.data)
            self.digest.toggle(peer, before.sequence)
        self._expired.pop(peer, None)
        self._lost.pop(peer, None)
        self._suspects.pop(peer, None)
        self._held[peer] = held
        self._soonest_s = min(self._soonest_s, held.expires_s)
        self._envelopes.add(held.signed.data)
        self.digest.toggle(peer, held.sequence)
        if not held.is_tombstone or (before is not None and not before.is_tombstone):
            self._change()

    def _drop(self, peer: PeerId, now_s: float) -> bool:
        """Forget all but the sequence; whether the snapshot changes."""
        held = self._held.pop(peer)
        self._envelopes.discard(held.signed.data)
        self._suspects.pop(peer, None)
        self.digest.toggle(peer, held.sequence)
        self._expired[peer] = held.sequence
        if len(self._expired) > REMEMBERED_MAX:
            self._expired.popitem(last=False)
        if not held.is_tombstone:
            self._lost[peer] = _Lost(held, now_s)
            if len(self._lost) > LOST_MAX:
                self._lost.popitem(last=False)
        return not held.is_tombstone

    def _make_room(self, now_s: float) -> None:
        if len(self._held) < self._records_max:
            return
        gone = [(held.expires_s, peer) for peer, held in self._held.items() if held.is_tombstone]
        if not gone:
            raise PeerBusy(
                f"the directory is full ({self._records_max} peers)",
                retry_after_s=RECORD_TTL_S,
            )
        self._drop(min(gone)[1], now_s)

    def _change(self) -> None:
        self.version += 1
        for listener in self._listeners:
            listener()
