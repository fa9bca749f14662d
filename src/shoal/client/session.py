"""One session: a sequence along a chain, seen from its owner.

The client is the hop before the first block, with a log of what it sent, and the
receiver behind the last. The chain may change under it at any time (`repair.py`); what
was received stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from shoal.base.errors import BadInput, PeerUnknown, ShoalError
from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import ENTRY_TOKENS_MAX, SESSION_TOKENS_MAX, STALL_MIN_S
from shoal.base.spans import Span
from shoal.client.relay import Relay
from shoal.link.inbound import Admission, Inbound, Verdict
from shoal.link.log import Log, LogEntry, rows_of
from shoal.link.outbound import Outbound
from shoal.plan.view import Stage, Standby
from shoal.wire.frames import Buffer
from shoal.wire.messages import (
    WANT_ALL,
    WANT_LAST,
    WANT_NONE,
    Ack,
    Entry,
    Fork,
    Gap,
    Stale,
    Want,
)
from shoal.wire.tensors import row_bytes

LOSSES_MAX: Final = 3
"""A session that servers lose more often than this without a row has a bad server."""

STEP_S_MAX: Final = 8.0
"""Steps that take longer than this are asked after all the same."""

Payload = Buffer | Callable[[int, int], Buffer]
"""Rows as bytes, or what makes rows `position`, `count` again whenever they are sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One repair of a session's chain, as the user is told."""

    position: int
    """Rows received when it happened."""
    lost: tuple[PeerId, ...]
    replacement: tuple[PeerId, ...]
    replayed_tokens: int
    """Rows that the replacements must compute again (the most behind of them)."""
    pause_s: float
    """From the first sign of trouble to the next row received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One planned change of a session's chain, as the user is told."""

    position: int
    """Rows received when it happened."""
    left: tuple[PeerId, ...]
    entered: tuple[PeerId, ...]
    reason: Literal["leaving", "slow"]
    """A server asked to be left, or another chain is faster."""
    prepared_s: float
    """How long the new hops took to get ready while the old ones went on."""


@dataclass(slots=True)
class Trouble:
    """What went wrong since the last repair."""

    lost: set[PeerId] = field(default_factory=set)
    """Peers that must be replaced."""
    bad: set[PeerId] = field(default_factory=set)
    """Peers that answer, but with nonsense: replaced, or at least made to start afresh."""
    links: set[tuple[PeerId, PeerId]] = field(default_factory=set)
    """(sender, receiver) pairs whose link broke though both may live."""
    is_out_of_step: bool = False
    """Nothing is lost for sure: ask everybody what they have."""
    since_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.lost or self.bad or self.links or self.is_out_of_step)


class SessionState:
    """What a session is, without I/O: logs, cursors, relays, received rows."""

    def __init__(
        self,
        session: SessionId,
        span: Span,
        encoding: str,
        hidden_size: int,
        inner_encoding: str | None = None,
        adapter: bytes = b"",
    ) -> None:
        self.id = session
        self.adapter = adapter
        """Name of the adapter that the rows go through; empty: none."""
        self.span = span
        self.encoding = encoding
        self.row_bytes = row_bytes(encoding, hidden_size)
        self.inner_encoding = inner_encoding or encoding
        """Of the links between servers, which we may relay."""
        self.inner_row_bytes = row_bytes(self.inner_encoding, hidden_size)
        self.epoch = 0
        self.chain: tuple[Stage, ...] = ()
        """Stages in order, the client's own pass-through hops included."""
        self.standbys: tuple[Standby, ...] = ()
        self.queued_at: set[PeerId] = set()
        """Full servers at which the session waits in line."""
        self.unfit: dict[PeerId, float] = {}
        """Peers that could not stand by, and the loop time at which they may be asked again."""
        self.unfit_times: dict[PeerId, int] = {}
        self.leaving: dict[PeerId, tuple[Span, float]] = {}
        """Blocks that servers said they would leave, and until when that counts."""
        self.log = Log()
        self.outbound = Outbound(session, span.start, self.log)
        self.feeds: dict[PeerId, Outbound] = {}
        """The links to standbys that we feed, by receiver."""
        self.inbound = Inbound(session, span.end, is_final=True)
        self.relays: dict[int, Relay] = {}
        self.received: list[LogEntry] = []
        self.parent: Fork | None = None
        self.trouble = Trouble()
        self.failure: ShoalError | None = None
        self.last_error: ShoalError | None = None
        """What a peer was last blamed for."""
        self.recoveries: list[Recovery] = []
        self.moves: list[Move] = []
        self.numerics = "exact"
        self.progressed_s = 0.0
        """Loop time of the last row received, or of the first one sent after a pause."""
        self.asked_s = 0.0
        """Loop time when everybody was last asked what they have."""
        self._took_s = 0.0
        """How long the last rows were waited for."""
        self.resync_after_s = STALL_MIN_S
        """Without progress for this long, ask everybody what they have; doubles each time."""
        self.classes: dict[PeerId, str] = {}
        """Numerics class of each hop's server, as its record said when it was chosen."""
        self.distrusted: set[PeerId] = set()
        """Peers whose state of this session must not be used again."""
        self.held: dict[tuple[PeerId, int], int] = {}
        """What the hops held when the route was last made, by (peer, start block)."""
        self.losses = 0
        """How often a server lost our state since the last row."""
        self.standstills = 0
        """Routes made anew since the last row, only because nothing came."""
        self.iterations: dict[PeerId, int] = {}
        """Engine iterations of suspects, as of the last standstill."""
        self.stuck_since_s: float | None = None
        """Loop time of the first repair since the last row."""
        self.backoff_s = 0.0
        self.mended_s = 0.0
        """Loop time at which the last repair ended."""
        self.pending_recovery: Recovery | None = None
        self.recovering_since_s = 0.0
        self.is_mending = False
        self.changed = asyncio.Event()
        """Rows were received, or the session failed."""
        self.stirred = asyncio.Event()
        """There is something for the supervisor to look at."""
        self.needs_tending = False
        """Standbys were lost, or a server wants to be left."""

    @property
    def peers(self) -> set[PeerId]:
        """The peers of the chain and the standbys."""
        return self.servers | self.standby_peers

    @property
    def standby_peers(self) -> set[PeerId]:
        """The peers that stand by."""
        return {standby.stage.peer for standby in self.standbys}

    @property
    def servers(self) -> set[PeerId]:
        """The peers of the chain, without ourselves."""
        return {stage.peer for stage in self.chain if len(stage.span)}

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return self.log.end

    @property
    def received_length(self) -> int:
        """Positions whose answer is here."""
        return self.inbound.have

    @property
    def is_waiting(self) -> bool:
        """Whether rows are outstanding."""
        return self.failure is None and self.inbound.have < self.log.end

    def append(self, payload: Payload, count: int, want: Want) -> None:
        """Log `count` more rows; the cursor sends them.

        Raises:
            BadInput: a wrong size, or too many rows at once or in all.
        """
        if want not in (WANT_NONE, WANT_LAST, WANT_ALL):
            raise BadInput(f"want is WANT_NONE, WANT_LAST or WANT_ALL (0, 1, 2), not {want!r}")
        if not 1 <= count <= ENTRY_TOKENS_MAX:
            raise BadInput(f"{count} rows at once (1 to {ENTRY_TOKENS_MAX})")
        if self.log.end + count > SESSION_TOKENS_MAX:
            raise BadInput(f"a session holds at most {SESSION_TOKENS_MAX} positions")
        size = count * self.row_bytes
        if not callable(payload) and memoryview(payload).nbytes != size:
            raise BadInput(
                f"{count} rows of {self.encoding} are {size} bytes, "
                f"got {memoryview(payload).nbytes}"
            )
        self.log.append(
            LogEntry(
                position=self.log.end,
                count=count,
                call_count=count,
                want=want,
                encoding=self.encoding,
                num_rows=count,
                payload=payload,
                payload_bytes=size,
            )
        )

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`, here now and elsewhere with the next rows."""
        if not 0 <= length <= self.log.end:
            raise BadInput(f"can't truncate {self.log.end} positions to {length}")
        if length == self.log.end:
            return
        rev = self.log.rev + 1
        self.log.cut(rev, [(rev, length)])
        for outbound in (self.outbound, *self.feeds.values()):
            outbound.on_cut()
        self.inbound.lower(length)
        kept = [entry.head(length) for entry in self.received if entry.position < length]
        self.received = [entry for entry in kept if entry.num_rows]

    def follow(
        self,
        chain: Sequence[Stage],
        epoch: int,
        me: PeerId,
        standbys: Sequence[Standby] = (),
    ) -> list[Outbound]:
        """Take over a new chain: who our neighbours are, whom we feed, and where we relay.

        Returns the links that are no longer needed.
        """
        old = self.outbounds()
        self.chain, self.epoch, self.standbys = tuple(chain), epoch, tuple(standbys)
        self._follow_feeds(epoch)
        self.outbound.reroute(chain[0].peer, epoch)
        self.inbound.reroute(chain[-1].peer, epoch)
        relays: dict[int, Relay] = {}
        for index, stage in enumerate(chain):
            if stage.peer != me:
                continue
            border, before = stage.span.start, chain[index - 1].peer
            relay = self.relays.get(border)
            if relay is None or before in self.distrusted:
                relay = Relay(self.id, border)
            relay.reroute(before, chain[index + 1].peer, epoch)
            relays[border] = relay
        self.relays = relays
        used = self.outbounds()
        return [outbound for outbound in old if outbound not in used]

    def _follow_feeds(self, epoch: int) -> None:
        feeds: dict[PeerId, Outbound] = {}
        for standby in self.standbys:
            peer = standby.stage.peer
            if standby.stage.span.start != self.span.start:
                continue
            outbound = self.feeds.get(peer)
            if outbound is None:
                outbound = Outbound(self.id, self.span.start, self.log)
            outbound.lag_rows = standby.lag_rows
            outbound.reroute(peer, epoch)
            feeds[peer] = outbound
        self.feeds = feeds

    def lose_standby(self, peer: PeerId, until_s: float) -> None:
        """A standby is none any more; don't ask it again before that."""
        self.unfit[peer] = until_s
        self.tend()

    def tend(self) -> None:
        """The supervisor should look at standbys and moves."""
        self.needs_tending = True
        self.stirred.set()

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Gap | Ack | Stale | None:
        """Rows arrived at the end of the chain or at a relay."""
        receiver = self._receiver(entry.border, peer)
        if receiver is None or entry.rev > self.log.rev:
            return Stale(self.id, entry.border, self.epoch)
        if isinstance(receiver, Relay):
            return receiver.on_entry(peer, entry, payload)
        limit = self.log.valid_length(entry.rev, SESSION_TOKENS_MAX)
        return self._take(receiver.admit(peer, entry, payload, limit))

    def report(self, trouble: Trouble, now_s: float) -> None:
        """Something went wrong; the supervisor looks into it."""
        if not self.trouble:
            self.trouble.since_s = now_s
        self.trouble.lost |= trouble.lost
        self.trouble.bad |= trouble.bad
        self.trouble.links |= trouble.links
        self.trouble.is_out_of_step |= trouble.is_out_of_step
        self.stirred.set()

    def link_trouble(self, sender: PeerId, receiver: PeerId, code: str) -> Trouble:
        """What it means that a server reports a broken link.

        One that does not know where to dial has not tried: the next route brings it a record.
        Where ours does not help either, the link is as good as broken.
        """
        if code == PeerUnknown.code and self.losses < LOSSES_MAX:
            self.losses += 1
            return Trouble(is_out_of_step=True)
        return Trouble(links={(sender, receiver)})

    def take_trouble(self) -> Trouble:
        """What was reported since the last call."""
        trouble, self.trouble = self.trouble, Trouble()
        return trouble

    def standby_at(self, peer: PeerId, start: int) -> Stage | None:
        """The standby of `peer` that begins at block `start`, if there is one."""
        for standby in self.standbys:
            if (standby.stage.peer, standby.stage.span.start) == (peer, start):
                return standby.stage
        return None

    def ends_at(self, peer: PeerId, border: int) -> bool:
        """Whether a hop or standby of `peer` ends there: only such a one feeds a standby."""
        everybody = [*self.chain, *(standby.stage for standby in self.standbys)]
        return any(
            one.peer == peer and one.span.end == border for one in everybody if len(one.span)
        )

    def predecessor(self, peer: PeerId, start: int) -> PeerId | None:
        """The server before the hop of `peer` that begins at block `start`, if there is one.

        Where the client relays between the two, it is the server before the relay.
        """
        before: PeerId | None = None
        for stage in self.chain:
            if (stage.peer, stage.span.start) == (peer, start) and len(stage.span):
                return before
            if len(stage.span):
                before = stage.peer
        return None

    def suspect(self) -> PeerId | None:
        """The last hop that holds more than the one after it: there the rows stop.

        Hops before it may hold more still, but only because its window is full.
        """
        stages = [stage for stage in self.chain if len(stage.span)]
        lengths = [self.held.get((stage.peer, stage.span.start), 0) for stage in stages]
        lengths.append(self.received_length)
        behind = [
            stage.peer
            for stage, have, passed_on in zip(stages, lengths, lengths[1:], strict=False)
            if have > passed_on
        ]
        return behind[-1] if behind else None

    def start_as_fork(self, parent: SessionState, rev: int, length: int) -> None:
        """Begin with the parent's first `length` positions, here and in the relays."""
        self.chain = parent.chain
        self.classes = dict(parent.classes)
        self.log = parent.log.fork(rev, length)
        self.outbound = Outbound(self.id, self.span.start, self.log)
        self.inbound.have = min(length, parent.received_length)
        self.relays = {
            border: Relay(self.id, border, relay.log.fork(rev, length))
            for border, relay in parent.relays.items()
            if relay.log.rev >= rev
        }

    def advanced(self, now_s: float) -> None:
        """Rows were received: whatever was wrong is over."""
        took_s, self._took_s = self._took_s, now_s - self.progressed_s
        self.progressed_s = now_s
        # Steps that are always slow are no standstill; one long prompt says nothing of the next.
        self.resync_after_s = max(STALL_MIN_S, 2 * min(took_s, self._took_s, STEP_S_MAX))
        self.losses = self.standstills = 0
        self.stuck_since_s = None
        self.backoff_s = 0.0
        self.finish_recovery(now_s)

    def finish_recovery(self, now_s: float | None = None) -> None:
        """A row came, or another repair began: the last repair's pause is over."""
        recovery, self.pending_recovery = self.pending_recovery, None
        if recovery is not None:
            pause_s = recovery.pause_s if now_s is None else now_s - self.recovering_since_s
            self.recoveries.append(replace(recovery, pause_s=pause_s))

    def fail(self, error: ShoalError) -> None:
        """End the session: everybody who waits gets this error."""
        if self.failure is None:
            self.failure = error
        self.changed.set()

    def receiver_at(self, border: int, peer: PeerId) -> Inbound | None:
        """Who receives over this border from `peer` here."""
        receiver = self._receiver(border, peer)
        return receiver.inbound if isinstance(receiver, Relay) else receiver

    def outbounds(self) -> list[Outbound]:
        """All links that the client sends over."""
        return [
            self.outbound,
            *self.feeds.values(),
            *(relay.outbound for relay in self.relays.values()),
        ]

    def take_rows(self, start: int, end: int) -> bytes:
        """The received rows of positions [start, end), as wanted; they are forgotten here."""
        mine = [entry for entry in self.received if start < entry.end and entry.position < end]
        self.received = [entry for entry in self.received if entry.position >= end]
        return b"".join(entry.tail(start).head(end).data() for entry in mine)

    def _receiver(self, border: int, peer: PeerId) -> Relay | Inbound | None:
        relay = self.relays.get(border)
        if relay is not None and relay.inbound.predecessor == peer:
            return relay
        return self.inbound if border == self.span.end else None

    def has_expected_form(self, entry: Entry, is_final: bool) -> bool:
        """Whether received rows have the encoding and the size of their link."""
        if is_final:
            num_rows, size, encoding = (
                rows_of(entry.want, entry.count),
                self.row_bytes,
                self.encoding,
            )
        else:
            num_rows, size, encoding = entry.count, self.inner_row_bytes, self.inner_encoding
        return entry.encoding == encoding and entry.payload_bytes == num_rows * size

    def _take(self, admission: Admission) -> Gap | Ack | Stale | None:
        match admission.verdict:
            case Verdict.STALE:
                return self.inbound.stale_message()
            case Verdict.GAP:
                return self.inbound.gap_message()
            case Verdict.ACCEPTED if admission.entry is not None:
                if admission.entry.num_rows:
                    self.received.append(admission.entry)
                self.changed.set()
        return self.inbound.ack_message(self.inbound.have)

    def check_open(self) -> None:
        """Raise why the session ended, if it did."""
        if self.failure is not None:
            raise self.failure


def split_chunks(start: int, count: int, chunk_tokens: int, want: Want) -> list[tuple[int, Want]]:
    """(count, want) of each chunk of a step: only the last one answers WANT_LAST."""
    sizes = [chunk_tokens] * (count // chunk_tokens)
    if count % chunk_tokens:
        sizes.append(count % chunk_tokens)
    if want == WANT_ALL:
        return [(size, WANT_ALL) for size in sizes]
    return [*((size, WANT_NONE) for size in sizes[:-1]), (sizes[-1], want)]
