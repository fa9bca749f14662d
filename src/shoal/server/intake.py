"""What is let in: streams per peer, bytes per second, rows that wait, entries that fit.

The server asks before it takes anything; nothing here sends or waits by itself, but for
the pace of a peer that sends too fast.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.base.backend import BackendFacts
from shoal.base.errors import BadInput, PeerBusy, SessionTooLong
from shoal.base.ids import PeerId, short
from shoal.base.limits import PAYLOAD_BYTES_MAX, SESSION_TOKENS_MAX
from shoal.server.pace import Pace
from shoal.server.quotas import Quotas
from shoal.server.session import HopSession
from shoal.server.sessions import SessionTable
from shoal.wire.messages import Entry
from shoal.wire.tensors import check_payload, row_bytes

logger = logging.getLogger(__name__)

STREAM_RETRY_S = 5.0
"""When a peer with too many streams may try again: broken ones are noticed by then."""

PACE_NOTICE_S = 0.01
"""Waits below this are not worth a timer: they add up to the next one."""


class Intake:
    """Bounds on what comes into one server."""

    def __init__(
        self, quotas: Quotas, facts: BackendFacts, sessions: SessionTable, window_bytes: int
    ) -> None:
        self._quotas = quotas
        self._facts = facts
        self._sessions = sessions
        self._window_bytes = window_bytes
        self._streams: Counter[PeerId] = Counter()
        self._paces: dict[PeerId, Pace] = {}
        self._queued: Counter[PeerId] = Counter()
        """At least the bytes that wait, by owner; counted anew when it looks too much."""
        self._crowded: set[PeerId] = set()
        """Owners some of whose rows were dropped for that."""

    @contextmanager
    def stream(self, peer: PeerId) -> Iterator[None]:
        """While a stream of this peer is open.

        Raises:
            PeerBusy: the peer has enough of them.
        """
        limit = self._quotas.streams_per_peer
        if self._streams[peer] >= limit:
            raise PeerBusy(f"you have {limit} streams open here", retry_after_s=STREAM_RETRY_S)
        self._streams[peer] += 1
        try:
            yield
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
                self._paces.pop(peer, None)

    def pace(self, peer: PeerId) -> Pace:
        """What holds a peer's rows to its rate, over all its streams."""
        if peer not in self._paces:
            rate = float(self._quotas.bytes_per_s_per_peer)
            self._paces[peer] = Pace(lambda: rate, PACE_NOTICE_S)
        return self._paces[peer]

    def check_entry(self, entry: Entry, output_encoding: str) -> None:
        """Refuse rows that can't be run or answered.

        Raises:
            BadInput: a wrong size or encoding.
            SessionTooLong: more rows than a frame or the model's context holds.
        """
        facts = self._facts
        if entry.count * row_bytes(output_encoding, facts.hidden_size) > PAYLOAD_BYTES_MAX:
            raise SessionTooLong(f"{entry.count} rows at once are too many for one frame")
        check_payload(entry.encoding, facts.hidden_size, entry.count, entry.payload_bytes)
        if entry.encoding not in facts.encodings:
            raise BadInput(f"encoding {entry.encoding!r} is not served here")
        end = entry.position + entry.count
        if end > min(facts.session_tokens_max, SESSION_TOKENS_MAX):
            raise SessionTooLong(
                f"position {end} is beyond the model's context of {facts.session_tokens_max}"
            )

    def takes(self, hop: HopSession, num_bytes: int) -> bool:
        """Whether rows may wait here; if not, they are dropped and asked for again later."""
        owner = hop.plan.owner
        if hop.queue_bytes > 4 * self._window_bytes + PAYLOAD_BYTES_MAX:
            hop.is_overrun = True
        elif self._queued[owner] + num_bytes > self._quotas.queue_bytes_per_client:
            self._queued[owner] = self._waiting_bytes(owner)
            if self._queued[owner] + num_bytes > self._quotas.queue_bytes_per_client:
                logger.info("too many rows wait owner=%s", short(owner))
                hop.is_overrun = True
                self._crowded.add(owner)
        if hop.is_overrun:
            return False
        self._queued[owner] += num_bytes
        return True

    def reopened(self, hop: HopSession) -> list[HopSession]:
        """Some of the hop's rows were worked off: hops that may take rows again now."""
        owner = hop.plan.owner
        if owner not in self._crowded:
            return self._released([hop])
        self._queued[owner] = self._waiting_bytes(owner)
        if self._queued[owner] > self._quotas.queue_bytes_per_client // 2:
            return []
        self._crowded.discard(owner)
        return self._released(self._sessions.of_owner(owner))

    def forget(self, owner: PeerId) -> None:
        """The owner has no sessions left."""
        self._queued.pop(owner, None)
        self._crowded.discard(owner)

    def _released(self, hops: list[HopSession]) -> list[HopSession]:
        free = [hop for hop in hops if hop.is_overrun and hop.queue_bytes < self._window_bytes]
        for hop in free:
            hop.is_overrun = False
        return free

    def _waiting_bytes(self, owner: PeerId) -> int:
        return sum(hop.queue_bytes for hop in self._sessions.of_owner(owner))
