"""How records spread: names are offered, what is lacking is wanted, signed bytes come.

Sans-I/O, for one peer. Every record that its store takes, wherever it came from, is
offered to every neighbour that has not offered it itself.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.base.errors import PeerBusy, PeerMisbehaved, PeerRefused, ProtocolError
from shoal.base.ids import PeerId, short
from shoal.base.limits import RECORDS_MAX
from shoal.discovery.allowance import UpdateLimits
from shoal.discovery.digest import bucket_of
from shoal.discovery.directory import SignedRecord
from shoal.discovery.exchange import PAGE_BYTES_MAX, RECORD_OVERHEAD_BYTES
from shoal.discovery.neighbourhood import Neighbour, Neighbourhood, name_of
from shoal.discovery.records import claimed_peer
from shoal.discovery.store import RecordStore
from shoal.wire.directory import Records
from shoal.wire.gossip import Digest, Offer, RecordName, Suspects, Taken, WantRecords

logger = logging.getLogger(__name__)

OFFER_GAP_S: Final = 1.0
"""News for one neighbour are gathered this long, unless it was offered nothing lately: in
a large swarm news come all the time, and one frame then carries several."""

DIGEST_PERIOD_S: Final = 20.0
"""A digest goes to one neighbour this often: what a lost offer made us miss comes then."""

WANT_TIMEOUT_S: Final = 3.0
"""A neighbour that was asked for a record gets this long before another one is asked."""

BAD_MAX: Final = 8
"""Bad records from one neighbour before it is dropped: it should have checked them."""


@dataclass(slots=True)
class _Wanted:
    sequence: tuple[int, int]
    asked_s: float
    others: list[PeerId] = field(default_factory=list)
    """Who else offered it."""


class Spreading:
    """The part of a Gossiper that hands records around."""

    def __init__(self, around: Neighbourhood, store: RecordStore, rng: random.Random) -> None:
        self._around = around
        self._store = store
        self._rng = rng
        self._wanted: dict[PeerId, _Wanted] = {}
        self._updates = UpdateLimits()
        self._next_digest_s = 0.0
        store.on_news(self._on_news)

    def greet(self, neighbour: Neighbour, now_s: float) -> None:
        """A stream opened: whoever dialled it says first what it holds."""
        if neighbour.is_dialled:
            self._around.send(neighbour.peer, Digest(self._store.digest.pack()), now_s)

    def publish(self, signed: SignedRecord, call: int, now_s: float) -> list[PeerId]:
        """Hand a record of ours to every neighbour as it is; each answers Taken."""
        told = list(self._around.neighbours)
        for peer in told:
            self._around.neighbours[peer].pending.pop(PeerId(signed.record.peer), None)
            self._around.send(peer, Records(call, [signed.data]), now_s)
        return told

    def tick(self, now_s: float) -> None:
        """Offer what waited, ask others for what did not come, compare digests."""
        self.flush(now_s)
        for peer, wanted in list(self._wanted.items()):
            if now_s - wanted.asked_s >= WANT_TIMEOUT_S:
                self._ask_another(peer, wanted, now_s)
        if now_s >= self._next_digest_s:
            self._next_digest_s = now_s + DIGEST_PERIOD_S * self._rng.uniform(0.8, 1.2)
            self._updates.forget(now_s)
            if self._around.neighbours:
                peer = self._rng.choice(list(self._around.neighbours))
                self._around.send(peer, Digest(self._store.digest.pack()), now_s)

    def flush(self, now_s: float) -> None:
        """Offer what is due to be offered."""
        for neighbour in self._around.neighbours.values():
            if neighbour.pending and now_s - neighbour.offered_s >= OFFER_GAP_S:
                neighbour.offered_s = now_s
                names, neighbour.pending = list(neighbour.pending.values()), {}
                self._around.send(neighbour.peer, Offer(names), now_s)

    # --- what neighbours say -----------------------------------------------------------

    def on_digest(self, neighbour: Neighbour, message: Digest, now_s: float) -> None:
        """Offer everything in the buckets that differ."""
        buckets = self._store.digest.differing(message.hashes)
        if buckets:
            names = list(self._in_buckets(buckets))
            self._around.send(neighbour.peer, Offer(names, buckets), now_s)

    def on_offer(self, neighbour: Neighbour, message: Offer, now_s: float) -> None:
        """Want what is later than ours; offer what ours is later than; tell who has gone."""
        wants: list[PeerId] = []
        better: list[RecordName] = []
        gone: list[RecordName] = []
        for name in message.names:
            peer, sequence = PeerId(name.peer), (name.boot_ms, name.counter)
            known = self._store.sequence(peer)
            if known is None or sequence > known:
                if self._may_ask(peer, sequence, neighbour.peer, now_s):
                    wants.append(peer)
                continue
            held = self._store.find(peer)
            if held is None:
                if sequence < known or not self._store.restore(peer, now_s):
                    gone.append(name)
            elif sequence < known:
                better.append(name_of(held))
            neighbour.pending.pop(peer, None)
        self.flush(now_s)
        if message.buckets:
            offered = {name.peer for name in message.names}
            better += [n for n in self._in_buckets(message.buckets) if n.peer not in offered]
        for answer in (
            WantRecords(list(wants)) if wants else None,
            Offer(better) if better else None,
            Suspects(gone) if gone else None,
        ):
            if answer is not None:
                self._around.send(neighbour.peer, answer, now_s)

    def on_wants(self, neighbour: Neighbour, message: WantRecords, now_s: float) -> None:
        """Hand over what is asked for, in as many frames as it takes."""
        page: list[bytes] = []
        ages_s: list[float] = []
        room = PAGE_BYTES_MAX
        for peer in message.peers:
            held = self._store.find(PeerId(peer))
            if held is None:
                continue
            if not neighbour.wants.take(now_s):
                self._around.counts["flood"] += 1
                break
            room -= len(held.data) + RECORD_OVERHEAD_BYTES
            if room < 0:
                self._around.send(neighbour.peer, Records(0, page, True, ages_s), now_s)
                page, ages_s = [], []
                room = PAGE_BYTES_MAX - len(held.data) - RECORD_OVERHEAD_BYTES
            page.append(held.data)
            ages_s.append(self._store.age_s(PeerId(peer), now_s))
        if page:
            self._around.send(neighbour.peer, Records(0, page, False, ages_s), now_s)

    def on_records(self, neighbour: Neighbour, message: Records, now_s: float) -> None:
        """Take what is good.

        Raises:
            PeerMisbehaved: the neighbour has handed over BAD_MAX bad records.
        """
        for index, data in enumerate(message.records):
            age_s = message.ages_s[index] if index < len(message.ages_s) else 0.0
            try:
                self._around.counts[self._take(neighbour, data, age_s, now_s)] += 1
            except PeerBusy as error:
                self._around.counts[error.code] += 1
                logger.warning("record not kept reason=%s", error)
            except (ProtocolError, PeerMisbehaved, PeerRefused) as error:
                self._around.counts[error.code] += 1
                neighbour.num_bad += 1
                logger.warning("record refused source=%s reason=%s", short(neighbour.peer), error)
        if neighbour.num_bad >= BAD_MAX:
            raise PeerMisbehaved(
                f"{short(neighbour.peer)} handed over {neighbour.num_bad} bad records"
            )
        if message.call:
            self._around.send(neighbour.peer, Taken(message.call), now_s)

    # --- parts -----------------------------------------------------------------------

    def _take(self, neighbour: Neighbour, data: bytes, age_s: float, now_s: float) -> str:
        """What became of a record, in one word."""
        peer = claimed_peer(data)
        held = self._store.find(peer)
        if held is not None and held.data == data:
            neighbour.pending.pop(peer, None)
            return "repeated"
        if not neighbour.records.take(now_s):
            return "flood"
        if held is not None and not self._updates.take(peer, now_s):
            return "flood"
        is_news = self._store.accept(data, now_s, age_s)
        self._wanted.pop(peer, None)
        neighbour.pending.pop(peer, None)
        return "news" if is_news else "stale"

    def _on_news(self, signed: SignedRecord) -> None:
        name = name_of(signed)
        for neighbour in self._around.neighbours.values():
            neighbour.pending[PeerId(name.peer)] = name

    def _may_ask(
        self, peer: PeerId, sequence: tuple[int, int], source: PeerId, now_s: float
    ) -> bool:
        """Whether to ask `source` now: nobody else was asked for this record lately."""
        wanted = self._wanted.get(peer)
        if wanted is not None and wanted.sequence >= sequence:
            if source not in wanted.others:
                wanted.others.append(source)
            return False
        if len(self._wanted) >= RECORDS_MAX:
            self._around.counts["flood"] += 1
            return False
        self._wanted[peer] = _Wanted(sequence, now_s)
        return True

    def _ask_another(self, peer: PeerId, wanted: _Wanted, now_s: float) -> None:
        others = [other for other in wanted.others if other in self._around.neighbours]
        if not others:
            del self._wanted[peer]
            return
        source, *wanted.others = others
        wanted.asked_s = now_s
        self._around.send(source, WantRecords([peer]), now_s)

    def _in_buckets(self, buckets: Sequence[int]) -> Iterable[RecordName]:
        chosen = set(buckets)
        for peer, sequence in self._store.sequences():
            if bucket_of(peer) in chosen:
                yield RecordName(peer, *sequence)
