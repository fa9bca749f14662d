"""What is let in: streams per peer, rows that wait, entries that fit.

The server asks before it takes anything; nothing here sends or waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from shoal.base.backend import BackendFacts
from shoal.base.errors import BadInput, PeerBusy, SessionTooLong
from shoal.base.ids import PeerId, short
from shoal.base.limits import PAYLOAD_BYTES_MAX, SESSION_TOKENS_MAX
from shoal.net.origin import Origin
from shoal.server.quotas import Quotas
from shoal.server.session import HopSession, SessionKey
from shoal.server.sessions import SessionTable
from shoal.wire.frames import Buffer
from shoal.wire.messages import Entry
from shoal.wire.tensors import check_payload, row_bytes

logger = logging.getLogger(__name__)

_K = TypeVar("_K")

STREAM_RETRY_S = 5.0
"""When a peer with too many streams may try again: broken ones are noticed by then."""

REOPEN_PERIOD_S = 0.25
"""How often to look whether dropped rows may come again."""

PINNED_FACTOR = 4
"""Rows that wait may keep a frame in memory that is this many times as large, not more."""


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
        self._streams_at: Counter[Origin] = Counter()
        self._queued: Counter[PeerId] = Counter()
        """At least the bytes that wait, by owner; counted anew when it looks too much."""
        self._queued_at: Counter[Origin] = Counter()
        """The same by address."""
        self._overrun: dict[SessionKey, HopSession] = {}
        """Hops whose rows were dropped."""
        self.overran = asyncio.Event()
        """Set while there are such: who asks `reopened` need not ask an idle server."""

    @contextmanager
    def stream(self, peer: PeerId, origin: Origin | None = None) -> Iterator[None]:
        """While a stream of this peer is open.

        Raises:
            PeerBusy: the peer, or its address, has enough of them.
        """
        limit = self._quotas.streams_per_peer
        if self._streams[peer] >= limit:
            raise PeerBusy(f"you have {limit} streams open here", retry_after_s=STREAM_RETRY_S)
        at_limit = self._quotas.streams_per_address
        if origin is not None and self._streams_at[origin] >= at_limit:
            raise PeerBusy(
                f"peers of your address have {at_limit} streams open here",
                retry_after_s=STREAM_RETRY_S,
            )
        self._streams[peer] += 1
        if origin is not None:
            self._streams_at[origin] += 1
        try:
            yield
        finally:
            _drop_one(self._streams, peer)
            if origin is not None:
                _drop_one(self._streams_at, origin)

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
        """Whether rows may wait here; if not, they are dropped and asked for again later.

        An owner of whom nothing waits may always send one entry.
        """
        if hop.is_overrun:
            return False
        owner = hop.plan.owner
        limit = self._quotas.queue_bytes_per_client
        if hop.queue_bytes > 4 * self._window_bytes + PAYLOAD_BYTES_MAX:
            return self._drop(hop)
        if self._queued[owner] and self._queued[owner] + num_bytes > limit:
            self._queued[owner] = self._waiting_bytes(owner)
            if self._queued[owner] and self._queued[owner] + num_bytes > limit:
                return self._drop(hop)
        if not self._address_takes(hop.origin, num_bytes):
            return self._drop(hop)
        self._queued[owner] += num_bytes
        return True

    def _address_takes(self, origin: Origin | None, num_bytes: int) -> bool:
        """Whether clients of an address may have so much more waiting; one alone always may."""
        if origin is None:
            return True
        limit, queued = self._address_limit, self._queued_at
        if queued[origin] + num_bytes > limit:
            queued[origin] = sum(hop.queue_bytes for hop in self._sessions if hop.origin == origin)
        if queued[origin] and queued[origin] + num_bytes > limit:
            return False
        queued[origin] += num_bytes
        return True

    @property
    def _address_limit(self) -> int:
        quotas = self._quotas
        return quotas.queues_per_address * quotas.queue_bytes_per_client

    def reopened(self) -> list[HopSession]:
        """Hops whose rows were dropped and that may take rows again now.

        To be asked now and then: rows that wait can vanish in many ways.
        """
        if not self._overrun:
            self.overran.clear()
            return []
        waiting: Counter[PeerId] = Counter()
        waiting_at: Counter[Origin] = Counter()
        for hop in self._sessions:
            waiting[hop.plan.owner] += hop.queue_bytes
            if hop.origin is not None:
                waiting_at[hop.origin] += hop.queue_bytes
        self._queued, self._queued_at = waiting, waiting_at
        free: list[HopSession] = []
        for hop in list(self._overrun.values()):
            if self._sessions.find(hop.key) is not hop:
                del self._overrun[hop.key]
            elif self._may_reopen(hop, waiting[hop.plan.owner]) and (
                hop.origin is None or waiting_at[hop.origin] <= self._address_limit // 2
            ):
                del self._overrun[hop.key]
                hop.is_overrun = False
                free.append(hop)
        return free

    def _may_reopen(self, hop: HopSession, waiting_bytes: int) -> bool:
        is_short = hop.queue_bytes < self._window_bytes
        return is_short and waiting_bytes <= self._quotas.queue_bytes_per_client // 2

    def forget(self, owner: PeerId) -> None:
        """The owner has no sessions left."""
        self._queued.pop(owner, None)
        origins = {hop.origin for hop in self._sessions}
        for origin in self._queued_at.keys() - origins:
            del self._queued_at[origin]

    def _drop(self, hop: HopSession) -> bool:
        logger.info("too many rows wait session=%s", short(hop.plan.session))
        hop.is_overrun = True
        self._overrun[hop.key] = hop
        self.overran.set()
        return False

    def _waiting_bytes(self, owner: PeerId) -> int:
        return sum(hop.queue_bytes for hop in self._sessions.of_owner(owner))


def _drop_one(counter: Counter[_K], key: _K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def compact(payload: Buffer) -> Buffer:
    """The same bytes, copied when they would keep a much larger frame in memory."""
    if not isinstance(payload, memoryview) or payload.obj is None:
        return payload
    whole_bytes = memoryview(payload.obj).nbytes
    return bytes(payload) if whole_bytes > PINNED_FACTOR * payload.nbytes else payload
