"""The receiving end of one session's link: which rows are let in. Pure.

Only the predecessor that the highest epoch names may speak, with that epoch. A higher
revision cuts first, a lower one is dropped, rows already held are skipped, and a gap is
answered by what is held.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import SESSION_TOKENS_MAX
from shoal.link.log import LogEntry, rows_of
from shoal.wire.frames import Buffer
from shoal.wire.messages import Ack, Entry, Gap, Have, Stale


class Verdict(enum.Enum):
    """What became of an entry."""

    ACCEPTED = "accepted"
    HELD = "held"
    OLD = "old"
    GAP = "gap"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Admission:
    """The verdict, the rows to take over and the cut to make before them."""

    verdict: Verdict
    entry: LogEntry | None = None
    cuts: tuple[tuple[int, int], ...] = ()
    """Non-empty when the revision rose: cut cache and log accordingly, then apply."""


class Inbound:
    """Epoch, predecessor, revision and length of what a hop accepted."""

    def __init__(self, session: SessionId, border: int, *, is_final: bool = False) -> None:
        self.session = session
        self.border = border
        self.is_final = is_final
        """Whether rows come as wanted (at the client, from the last hop) or all."""
        self.epoch = 0
        self.predecessor = PeerId(b"")
        self.rev = 0
        self.have = 0

    def reroute(self, predecessor: PeerId, epoch: int) -> None:
        """Follow a route of a higher epoch."""
        self.predecessor = predecessor
        self.epoch = epoch

    def lower(self, length: int) -> None:
        """Rows behind `length` were lost here and must come again."""
        self.have = min(self.have, length)

    def is_from_predecessor(self, peer: PeerId, epoch: int) -> bool:
        """Whether `peer` may send us rows of `epoch`."""
        return peer == self.predecessor and epoch == self.epoch

    def admit(
        self, peer: PeerId, header: Entry, payload: Buffer, limit: int = SESSION_TOKENS_MAX
    ) -> Admission:
        """Judge one entry and move on accordingly.

        Rows from position `limit` on are not wanted: the client knows of a truncation
        that has not travelled round the chain yet, but rows before it are still good.
        """
        if not self.is_from_predecessor(peer, header.epoch):
            return Admission(Verdict.STALE)
        if header.rev < self.rev:
            return Admission(Verdict.OLD)
        cuts: tuple[tuple[int, int], ...] = ()
        have = self.have
        if header.rev > self.rev:
            if self.rev < header.base_rev:
                return Admission(Verdict.GAP)
            cuts = tuple((c.rev, c.position) for c in header.cuts if c.rev > self.rev)
            have = min([have, *(position for _, position in cuts)])
        if header.position >= limit:
            self.rev, self.have = header.rev, have
            return Admission(Verdict.OLD, cuts=cuts)
        if header.position > have:
            return Admission(Verdict.GAP)
        self.rev, self.have = header.rev, have
        num_rows = rows_of(header.want, header.count) if self.is_final else header.count
        entry = _log_entry(header, num_rows, payload).head(limit)
        if entry.end <= have:
            return Admission(Verdict.HELD, cuts=cuts)
        self.have = entry.end
        return Admission(Verdict.ACCEPTED, entry.tail(have), cuts)

    def have_message(self, window_bytes: int, worked_off: int) -> Have:
        """The answer to Open; `worked_off` of the rows held are done with."""
        return Have(
            self.session, self.border, self.epoch, self.rev, self.have, window_bytes, worked_off
        )

    def gap_message(self) -> Gap:
        """The answer to rows that leave a gap."""
        return Gap(self.session, self.border, self.epoch, self.rev, self.have)

    def ack_message(self, length: int) -> Ack:
        """Rows up to `length` are worked off."""
        return Ack(self.session, self.border, self.epoch, self.rev, length)

    def stale_message(self) -> Stale:
        """The answer to a sender that is not, or not now, our predecessor."""
        return Stale(self.session, self.border, self.epoch)


def _log_entry(header: Entry, num_rows: int, payload: Buffer) -> LogEntry:
    return LogEntry(
        position=header.position,
        count=header.count,
        call_count=header.call_count,
        want=header.want,
        encoding=header.encoding,
        num_rows=num_rows,
        payload=payload,
        payload_bytes=header.payload_bytes,
    )
