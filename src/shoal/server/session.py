"""One hop of one session: what came in, what is in the cache, what went out.

Three lengths describe it. `inbound.have`: rows accepted. `cache_length`: rows in the
backend's KV cache. `log.end`: rows computed and logged. Rows between `cache_length` and
`inbound.have` wait in the queue. Normally cache and log end together; when only the
cache was lost (eviction, a coarse truncation) the same rows come again, fill the cache,
and their outputs are dropped because the log has them.

No I/O here; `sessions.py` and `engine.py` move it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Final

from shoal.base.adapters import AdapterId
from shoal.base.backend import Call, SequenceId
from shoal.base.errors import InternalError
from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import WINDOW_BYTES
from shoal.base.spans import Span
from shoal.link.inbound import Admission, Inbound, Verdict
from shoal.link.log import Log, LogEntry, rows_of
from shoal.link.outbound import Outbound
from shoal.net.origin import Origin
from shoal.wire.frames import Buffer
from shoal.wire.messages import Entry

SessionKey = tuple[SessionId, int]
"""(session, first block): what a hop's state is found by."""

NOBODY: Final = PeerId(b"")
"""Whom a standby sends to."""

REPLAY_ROWS_PER_RUN: Final = 32
"""Rows of one session's small entries in one iteration: a tile of the engine's exact mode, in
which 32 replayed rows cost hardly more than one (measured: 7 times faster than one by one)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """A standby that a hop feeds."""

    peer: PeerId
    lag_rows: int
    """Send when so many rows wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopPlan:
    """What a route says about one hop, or one standby."""

    session: SessionId
    owner: PeerId
    opened_ms: int
    epoch: int
    span: Span
    predecessor: PeerId
    successor: PeerId | None
    """None: a standby, which only gets ready."""
    is_last: bool
    """Whether this hop answers the owner, with the rows that are wanted."""
    encoding: str
    num_hops: int = 1
    """Hops of the whole chain."""
    is_fresh: bool = False
    """Whether what is held from earlier epochs must be forgotten."""
    feeds: tuple[Feed, ...] = ()
    """Standbys that get our rows as well."""
    adapter: bytes = b""
    """Name of the adapter that the rows go through; empty: none."""

    @property
    def is_standby(self) -> bool:
        """Whether it only gets ready to be a hop."""
        return self.successor is None

    def is_continued_by(self, new: HopPlan) -> bool:
        """Whether what was held for this serves `new`."""
        mine, theirs = (
            (plan.span, plan.encoding, plan.is_last, plan.adapter) for plan in (self, new)
        )
        return mine == theirs and not new.is_fresh


class HopSession:
    """The state of one hop of one session at this server."""

    def __init__(self, plan: HopPlan, sequence: SequenceId, *, window_bytes: int = WINDOW_BYTES):
        self.plan = plan
        self.sequence = sequence
        self.adapter: AdapterId | None = None
        """The plan's adapter inside the backend."""
        self.origin: Origin | None = None
        """Where its owner connects from."""
        self.window_bytes = window_bytes
        self.inbound = Inbound(plan.session, plan.span.start)
        self.inbound.reroute(plan.predecessor, plan.epoch)
        self.log = Log()
        self.outbound = Outbound(plan.session, plan.span.end, self.log)
        self.outbound.reroute(plan.successor or NOBODY, plan.epoch)
        self.feeds: dict[PeerId, Outbound] = {}
        """The links to standbys, by receiver."""
        self._follow_feeds()
        self.queue: deque[LogEntry] = deque()
        self.queue_bytes = 0
        self.running: deque[LogEntry] = deque()
        """What the engine works on: more than one entry only while a replay catches up."""
        self.cache_length = 0
        self.is_rebuilding = plan.epoch > 1
        """Rows come that were computed elsewhere before, and no new one has run yet."""
        self.is_parked = False
        """Cache given up under memory pressure: rows are dropped until it may return."""
        self.wants_return = False
        self.parked_length = 0
        self.is_overrun = False
        """The predecessor sent far beyond its window: rows are dropped until the queue is short."""
        self.used_s = 0.0
        """Loop time of the last sign of life."""
        self._valid_until: int | None = None
        """Cache and running rows from here on are void: a truncation is due."""
        self._unacked_bytes = 0

    @property
    def key(self) -> SessionKey:
        """What the state is found by."""
        return (self.plan.session, self.plan.span.start)

    @property
    def seniority(self) -> tuple[bool, int, bytes]:
        """Victim order: who opened first goes last, standbys before all. Same on every server."""
        return (self.plan.is_standby, self.plan.opened_ms, self.plan.session)

    @property
    def outbounds(self) -> list[Outbound]:
        """All links that our log is sent over."""
        main = [] if self.plan.is_standby else [self.outbound]
        return [*main, *self.feeds.values()]

    @property
    def has_work(self) -> bool:
        """Whether rows wait or run here."""
        return bool(self.queue or self.running)

    @property
    def waiting_tokens(self) -> int:
        """Rows that wait in the queue."""
        return sum(entry.count for entry in self.queue)

    @property
    def settled_length(self) -> int:
        """The cache's length once the truncation that is due is made."""
        return self._valid(self.cache_length)

    def follow(self, plan: HopPlan) -> list[Outbound]:
        """Take over a route of a higher epoch for the same span and encoding.

        Returns the links that are no longer used.
        """
        before = self.outbounds
        self.plan = plan
        self.inbound.reroute(plan.predecessor, plan.epoch)
        self.outbound.reroute(plan.successor or NOBODY, plan.epoch)
        self._follow_feeds()
        used = self.outbounds
        return [outbound for outbound in before if outbound not in used]

    def _follow_feeds(self) -> None:
        plan = self.plan
        feeds: dict[PeerId, Outbound] = {}
        for feed in plan.feeds:
            outbound = self.feeds.get(feed.peer)
            if outbound is None:
                outbound = Outbound(plan.session, plan.span.end, self.log)
            outbound.lag_rows = feed.lag_rows
            outbound.reroute(feed.peer, plan.epoch)
            feeds[feed.peer] = outbound
        self.feeds = feeds

    def start_from(self, log: Log) -> None:
        """Begin as a fork: the cache already holds what `log` says."""
        self.log = log
        self.outbound = Outbound(self.plan.session, self.plan.span.end, log)
        self.outbound.reroute(self.plan.successor or NOBODY, self.plan.epoch)
        self.feeds = {}
        self._follow_feeds()
        self.inbound.have = self.cache_length = log.end

    def admit(self, peer: PeerId, header: Entry, payload: Buffer) -> Admission:
        """Judge arriving rows and queue them."""
        admission = self.inbound.admit(peer, header, payload)
        if admission.cuts:
            self._cut(header.rev, admission.cuts)
        if admission.verdict is Verdict.ACCEPTED and admission.entry is not None:
            self.queue.append(admission.entry)
            self.queue_bytes += admission.entry.payload_bytes
        return admission

    def lose_cache(self, length: int) -> None:
        """Only the first `length` positions remain in the cache; the log stays."""
        self.inbound.lower(length)
        self._invalidate(length)

    def lose_log(self, length: int) -> None:
        """The log must be made anew from `length` on: rows there are recomputed."""
        self.lose_cache(length)
        self.log.restart(length)

    def shorten_log(self, keep_bytes: int) -> None:
        """Forget all but the last bytes of the log, as far as the successor acknowledged it."""
        start = self.log.tail_start(keep_bytes)
        self.log.trim(start if self.plan.is_standby else min(self.outbound.acked, start))

    def due_truncation(self) -> int | None:
        """Where the backend must truncate the cache now; None when nothing is due."""
        if self.running or self._valid_until is None:
            return None
        length, self._valid_until = self._valid_until, None
        return length if length < self.cache_length else None

    def cache_was_cut(self, wanted: int, actual: int) -> bool:
        """The backend kept `actual` positions; True when rows must come again for that."""
        self.cache_length = actual
        if actual >= wanted:
            return False
        self.inbound.lower(actual)
        self._drop_queue_from(actual)
        return True

    def next_count(self, calls_max: int) -> int:
        """How many queued entries go well into one engine iteration.

        Replayed decode rows come one entry each; a run may repeat many of them, up to the
        rows of one tile. Chunks go one by one, so that the successor can start on the first.
        """
        count, rows = 0, 0
        for entry in islice(self.queue, calls_max):
            rows += entry.count
            if count and rows > REPLAY_ROWS_PER_RUN:
                break
            count += 1
        return count

    def next_calls(self, count: int) -> list[Call]:
        """Take the first `count` entries of the queue into the engine."""
        return [self._next_call() for _ in range(min(count, len(self.queue)))]

    def _next_call(self) -> Call:
        entry = self.queue.popleft()
        self.queue_bytes -= entry.payload_bytes
        self.running.append(entry)
        is_logged = entry.end <= self.log.end
        num_rows = rows_of(entry.want, entry.count) if self.plan.is_last else entry.count
        return Call(
            sequence=self.sequence,
            span=self.plan.span,
            position=entry.position,
            count=entry.count,
            call_count=entry.call_count,
            payload=entry.data(),
            encoding=entry.encoding,
            output_encoding=self.plan.encoding,
            rows_wanted=0 if is_logged else num_rows,
        )

    def commit(self, output: bytes) -> None:
        """The first running rows are in the cache and their output goes into the log."""
        if not self.running:
            raise InternalError("commit without a running call")
        entry = self.running.popleft()
        self.cache_length = entry.end
        self._unacked_bytes += entry.payload_bytes
        keep = self._valid(entry.end)
        if keep <= max(self.log.end, entry.position):
            return
        num_rows = rows_of(entry.want, entry.count) if self.plan.is_last else entry.count
        result = LogEntry(
            position=entry.position,
            count=entry.count,
            call_count=entry.call_count,
            want=entry.want,
            encoding=self.plan.encoding,
            num_rows=num_rows,
            payload=output,
            payload_bytes=len(output),
        )
        self.log.append(result.head(keep).tail(self.log.end))

    def take_ack(self) -> int | None:
        """The length to acknowledge now, if enough was worked off since the last."""
        if self._unacked_bytes < self.window_bytes // 4:
            return None
        self._unacked_bytes = 0
        return self.settled_length

    def check_integrity(self) -> None:
        """Check that the lengths agree.

        Raises:
            InternalError: they contradict each other (our bug).
        """
        position = self._valid(self._computed_length)
        for entry in self.queue:
            if entry.position != position:
                raise InternalError(f"queue at {entry.position}, expected {position}")
            position = entry.end
        if position != self.inbound.have:
            raise InternalError(f"holds {position} positions, claims {self.inbound.have}")
        if self.queue_bytes != sum(entry.payload_bytes for entry in self.queue):
            raise InternalError("queue bytes leaked")
        if self.log.num_bytes != sum(entry.payload_bytes for entry in self.log):
            raise InternalError("log bytes leaked")

    @property
    def _computed_length(self) -> int:
        """The cache's length once the running rows are in it."""
        return self.running[-1].end if self.running else self.cache_length

    def _valid(self, length: int) -> int:
        return length if self._valid_until is None else min(length, self._valid_until)

    def _cut(self, rev: int, cuts: tuple[tuple[int, int], ...]) -> None:
        """The revision rose: what lies behind the cuts is forgotten everywhere."""
        self.log.cut(rev, cuts)
        for outbound in (self.outbound, *self.feeds.values()):
            outbound.on_cut()
        self._invalidate(min(position for _, position in cuts))

    def _invalidate(self, length: int) -> None:
        if length < self._computed_length:
            self._valid_until = self._valid(length)
        self._drop_queue_from(length)

    def _drop_queue_from(self, length: int) -> None:
        while self.queue and self.queue[-1].end > length:
            entry = self.queue.pop()
            self.queue_bytes -= entry.payload_bytes
            if entry.position < length:
                kept = entry.head(length)
                self.queue.append(kept)
                self.queue_bytes += kept.payload_bytes
