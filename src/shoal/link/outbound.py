"""The sending end of one session's link: one cursor over one log. Pure.

Push, retry, replay, drain and standby are all positions of the cursor, so a replay can
never race with new rows. Nothing but the cursor sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import CUTS_MAX, PAYLOAD_BYTES_MAX
from shoal.link.log import Log, LogEntry
from shoal.wire.messages import Cut, Entry

ENTRY_BYTES: Final = 160
"""An entry's fields in a header, with the largest numbers and names in use."""

CUT_BYTES: Final = 20
"""One cut in a header: two numbers of up to 9 bytes, and the array around them."""


@dataclass(frozen=True, slots=True)
class Sendable:
    """An entry's wire header and the log entry whose data goes with it."""

    header: Entry
    entry: LogEntry


class Outbound:
    """Cursor, window and state of the link to one receiver.

    A standby's link is one more outbound over the same log, with a lag.

    Life: `reroute` (a new epoch or a new stream; not open) -> Open is sent -> `on_have`
    (open) -> `next_entry` repeatedly. `on_gap` moves the cursor back, `on_ack` the window
    forward, `on_stale` ends it until the next `reroute`.
    """

    def __init__(self, session: SessionId, border: int, log: Log, *, lag_rows: int = 0) -> None:
        self.session = session
        self.border = border
        self.log = log
        self.lag_rows = lag_rows
        """Send when so many rows wait, then all of them: a standby runs them at one go."""
        self._is_flushing = False
        self.receiver = PeerId(b"")
        self.epoch = 0
        self.is_open = False
        self.is_stale = False
        self.cursor = 0
        self.acked = 0
        self.receiver_rev = 0
        self.window_bytes = 0
        self.in_flight_bytes = 0

    def reroute(self, receiver: PeerId, epoch: int) -> None:
        """Follow a new epoch (or reopen the same one): the receiver must be asked again."""
        self.receiver = receiver
        self.epoch = epoch
        self.is_open = False
        self.is_stale = False

    def on_have(
        self, epoch: int, rev: int, length: int, window_bytes: int, worked_off: int
    ) -> bool:
        """The receiver holds `length` positions at `rev`; returns False if out of date."""
        if epoch != self.epoch or self.is_stale:
            return False
        self.is_open = True
        self.window_bytes = window_bytes
        self._go_to(rev, length, worked_off)
        return True

    def _go_to(self, rev: int, length: int, worked_off: int) -> None:
        self.receiver_rev = rev
        self.cursor = self.log.valid_length(rev, length)
        self.acked = min(worked_off, self.cursor)
        self.in_flight_bytes = self.log.bytes_between(self.acked, self.cursor)

    def on_gap(self, epoch: int, rev: int, length: int) -> bool:
        """The receiver lost something: back to what it holds."""
        if epoch != self.epoch or not self.is_open:
            return False
        self._go_to(rev, length, self.acked)
        return True

    def on_ack(self, epoch: int, rev: int, length: int) -> bool:
        """The receiver worked off its first `length` positions."""
        if epoch != self.epoch or not self.is_open:
            return False
        length = min(self.log.valid_length(rev, length), self.cursor)
        if length > self.acked:
            self.acked = length
            self.in_flight_bytes = self.log.bytes_between(length, self.cursor)
        return True

    def on_stale(self, epoch: int) -> None:
        """The receiver follows a later epoch: stop until a new route says otherwise.

        A *lower* epoch means that the receiver's Route is still on its way; it sends
        Have by itself when it arrives.
        """
        if epoch > self.epoch:
            self.is_open = False
            self.is_stale = True
        elif epoch < self.epoch:
            self.is_open = False

    def on_cut(self) -> None:
        """The log was cut: what the receiver lost by that must be sent anew."""
        end = self.log.valid_length(self.receiver_rev, self.cursor)
        if self.cursor > end:
            self.cursor = end
            self.acked = min(self.acked, end)
            self.in_flight_bytes = self.log.bytes_between(self.acked, end)

    @property
    def needs_earlier(self) -> bool:
        """Whether the receiver needs rows that the log no longer holds."""
        return self.is_open and self.cursor < self.log.start

    @property
    def has_entry(self) -> bool:
        """Whether `next_entry` would return one."""
        return (
            self.is_open
            and self.receiver_rev <= self.log.rev
            and self.log.start <= self.cursor < self.log.end
            and self.in_flight_bytes < self.window_bytes
            and (self._is_flushing or self.log.end - self.cursor >= self.lag_rows)
        )

    @property
    def backlog_bytes(self) -> int:
        """How far the log is ahead of the cursor."""
        return self.log.bytes_between(self.cursor, self.log.end)

    def next_size(self) -> tuple[int, int]:
        """Payload and (at most) header bytes of the next entry; zeros when there is none."""
        entry = self.log.entry_at(self.cursor) if self.has_entry else None
        if entry is None:
            return 0, 0
        num_cuts = min(CUTS_MAX, len(self.log.cuts)) if self.receiver_rev < self.log.rev else 0
        return min(entry.payload_bytes, PAYLOAD_BYTES_MAX), ENTRY_BYTES + CUT_BYTES * num_cuts

    def next_entry(self) -> Sendable | None:
        """The next entry to send, or None; moves the cursor behind it."""
        if not self.has_entry:
            return None
        entry = self.log.entry_at(self.cursor)
        if entry is None:
            return None
        entry = entry.tail(self.cursor)
        if entry.payload_bytes > PAYLOAD_BYTES_MAX:
            rows = PAYLOAD_BYTES_MAX // (entry.payload_bytes // entry.num_rows)
            entry = entry.head(entry.position + max(1, rows))
        base_rev, rev = self.receiver_rev, self.log.rev
        cuts = [Cut(cut_rev, at) for cut_rev, at in self.log.cuts_after(base_rev)]
        self.receiver_rev = rev
        self.cursor = entry.end
        self._is_flushing = entry.end < self.log.end
        self.in_flight_bytes += entry.payload_bytes
        header = Entry(
            session=self.session,
            border=self.border,
            epoch=self.epoch,
            rev=rev,
            base_rev=base_rev,
            cuts=cuts,
            position=entry.position,
            count=entry.count,
            call_count=entry.call_count,
            want=entry.want,
            encoding=entry.encoding,
            payload_bytes=entry.payload_bytes,
        )
        return Sendable(header, entry)
