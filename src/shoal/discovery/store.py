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
from shoal.discovery.directory import SignedRecord, Snapshot
from shoal.discovery.records import open_record

REMEMBERED_MAX: Final = 4 * RECORDS_MAX
"""Expired peers whose last sequence is remembered, so that an old copy of a dead peer's
record, handed round among others, does not come back to life here."""


@dataclass(frozen=True, slots=True)
class _Held:
    signed: SignedRecord
    expires_s: float

    @property
    def is_tombstone(self) -> bool:
        return self.signed.record.state == "offline"


class RecordStore:
    """The records of one swarm.

    Args:
        swarm: records of other swarms are refused.
        is_lasting: records never expire; for fixed clusters, where a person vouches.
        records_max: peers that are held at once, those who have gone included.
    """

    def __init__(
        self, swarm: str, *, is_lasting: bool = False, records_max: int = RECORDS_MAX
    ) -> None:
        self.swarm = swarm
        self.version = 0
        """Rises with every change of the snapshot."""
        self._is_lasting = is_lasting
        self._records_max = records_max
        self._held: dict[PeerId, _Held] = {}
        self._envelopes: set[bytes] = set()
        self._expired: OrderedDict[PeerId, tuple[int, int]] = OrderedDict()
        self._snapshot = Snapshot(version=0)
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the snapshot."""
        self._listeners.append(listener)

    def accept(self, data: bytes, now_s: float) -> bool:
        """Take a record from anybody; whether it was news.

        A record with the sequence of the one we hold, or a lower one, is not news, and
        never makes it valid for longer.

        Raises:
            ProtocolError: malformed, too large, or not signed by its peer.
            PeerMisbehaved: the peer signed what can't be.
            PeerRefused: of another swarm.
            PeerBusy: the store is full.
        """
        self.expire(now_s)
        if data in self._envelopes:  # the usual case, and no signature to check
            return False
        record = open_record(data)
        peer = PeerId(record.peer)
        if record.swarm != self.swarm:
            raise PeerRefused(
                f"a record of {short(peer)} is of swarm {record.swarm!r}, not {self.swarm!r}"
            )
        known = self.sequence(peer)
        if known is not None and record.sequence <= known:
            return False
        if peer not in self._held:
            self._make_room()
        self._take(peer, SignedRecord(record=record, data=data), now_s)
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

    def expire(self, now_s: float) -> None:
        """Drop what is no longer valid."""
        expired = [peer for peer, held in self._held.items() if held.expires_s <= now_s]
        changes = [self._drop(peer) for peer in expired]
        if any(changes):
            self._change()

    @property
    def next_expiry_s(self) -> float:
        """When the next record expires; infinity if none does."""
        return min((held.expires_s for held in self._held.values()), default=math.inf)

    def snapshot(self) -> Snapshot:
        """All servers, by peer id; valid as of the last call that was handed the time."""
        if self._snapshot.version != self.version:
            here = [held.signed for held in self._held.values() if not held.is_tombstone]
            here.sort(key=lambda signed: signed.record.peer)
            self._snapshot = Snapshot(version=self.version, records=tuple(here))
        return self._snapshot

    def envelopes(self, after: bytes = b"") -> Iterator[tuple[PeerId, bytes]]:
        """What to hand on, tombstones too, in the order of peer ids, behind `after`."""
        for peer in sorted(peer for peer in self._held if peer > after):
            yield peer, self._held[peer].signed.data

    def _take(self, peer: PeerId, signed: SignedRecord, now_s: float) -> None:
        before = self._held.get(peer)
        if before is not None:
            self._envelopes.discard(before.signed.data)
        self._expired.pop(peer, None)
        ttl_s = math.inf if self._is_lasting else min(signed.record.ttl_s, RECORD_TTL_S)
        held = self._held[peer] = _Held(signed, now_s + ttl_s)
        self._envelopes.add(signed.data)
        if not held.is_tombstone or (before is not None and not before.is_tombstone):
            self._change()

    def _drop(self, peer: PeerId) -> bool:
        """Forget all but the sequence; whether the snapshot changes."""
        held = self._held.pop(peer)
        self._envelopes.discard(held.signed.data)
        self._expired[peer] = held.signed.record.sequence
        if len(self._expired) > REMEMBERED_MAX:
            self._expired.popitem(last=False)
        return not held.is_tombstone

    def _make_room(self) -> None:
        if len(self._held) < self._records_max:
            return
        gone = [(held.expires_s, peer) for peer, held in self._held.items() if held.is_tombstone]
        if not gone:
            raise PeerBusy(
                f"the directory is full ({self._records_max} peers)",
                retry_after_s=RECORD_TTL_S,
            )
        self._drop(min(gone)[1])

    def _change(self) -> None:
        self.version += 1
        for listener in self._listeners:
            listener()
