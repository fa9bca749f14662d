"""A hop's log: the append-only record of what it sent, from which everything is repaired.

Entries are the encoded rows as first sent, one per engine call. A truncation raises the
revision and cuts the tail. `cuts` remembers where each revision cut, so that a receiver
at any older revision can be told how far back to go.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from shoal.base.limits import CUTS_MAX
from shoal.wire.frames import Buffer
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE, Want


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """Rows `position` .. `position + count` of one session at one border.

    `payload` holds `num_rows` of them: all between hops; all, the last or none on the
    way to the client, as `want` says. A callable payload is made when it is sent (the
    client logs token ids, not embeddings); `payload_bytes` is its size.
    """

    position: int
    count: int
    call_count: int
    want: Want
    encoding: str
    num_rows: int
    payload: Buffer | Callable[[int, int], Buffer]
    payload_bytes: int

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self.position + self.count

    def data(self) -> Buffer:
        """The rows as bytes."""
        if callable(self.payload):
            return self.payload(self.position, self.count)
        return self.payload

    def head(self, end: int) -> LogEntry:
        """The same entry without the rows from position `end` on; keeps at least one."""
        if end >= self.end:
            return self
        count = end - self.position
        want: Want = WANT_NONE if self.want == WANT_LAST else self.want
        if self.num_rows < self.count:
            return replace(self, count=count, want=want, num_rows=0, payload=b"", payload_bytes=0)
        return self._slice(self.position, count, want)

    def tail(self, start: int) -> LogEntry:
        """The same entry without the rows before position `start`; keeps at least one."""
        if start <= self.position:
            return self
        count = self.end - start
        if self.num_rows < self.count:
            return replace(self, position=start, count=count)
        return self._slice(start, count, self.want)

    def _slice(self, position: int, count: int, want: Want) -> LogEntry:
        row_bytes = self.payload_bytes // self.count
        payload = self.payload
        if not callable(payload):
            offset = (position - self.position) * row_bytes
            payload = memoryview(payload)[offset : offset + count * row_bytes]
        return replace(
            self,
            position=position,
            count=count,
            want=want,
            num_rows=count,
            payload=payload,
            payload_bytes=count * row_bytes,
        )


def rows_of(want: Want, count: int) -> int:
    """How many of `count` rows an entry carries."""
    return {WANT_NONE: 0, WANT_LAST: 1, WANT_ALL: count}[want]


class Log:
    """Entries of one session at one hop, contiguous over `[start, end)`."""

    def __init__(self, start: int = 0) -> None:
        self.rev = 0
        self.cuts: list[tuple[int, int]] = []
        """(rev, position), both rising: the lowest position that a receiver below rev lost."""
        self.start = start
        self.end = start
        self.num_bytes = 0
        self._entries: list[LogEntry] = []
        self._positions: list[int] = []
        self._offsets: list[int] = []
        """Payload bytes of everything before each entry, since the log began."""
        self._offset = 0

    def __iter__(self) -> Iterator[LogEntry]:
        return iter(self._entries)

    def append(self, entry: LogEntry) -> None:
        """Add the next rows."""
        if entry.position != self.end:
            raise ValueError(f"log ends at {self.end}, entry starts at {entry.position}")
        self._entries.append(entry)
        self._positions.append(entry.position)
        self._offsets.append(self._offset)
        self._offset += entry.payload_bytes
        self.end = entry.end
        self.num_bytes += entry.payload_bytes

    def cut(self, rev: int, cuts: Iterable[tuple[int, int]]) -> None:
        """Go to revision `rev`: forget what the later revisions among `cuts` cut off."""
        for cut_rev, position in sorted(cuts):
            if cut_rev <= self.rev:
                continue
            while self.cuts and self.cuts[-1][1] >= position:
                self.cuts.pop()
            self.cuts.append((cut_rev, position))
            self._drop_from(position)
        self.rev = max(rev, self.rev)

    def cuts_after(self, rev: int) -> list[tuple[int, int]]:
        """What a receiver at `rev` must be told; at most CUTS_MAX, older ones merged."""
        later = self.cuts[self._first_cut_after(rev) :]
        if len(later) > CUTS_MAX:
            lowest = later[0][1]
            later = later[-CUTS_MAX:]
            later[0] = (later[0][0], lowest)
        return later

    def valid_length(self, rev: int, length: int) -> int:
        """How much of a receiver's `length` positions at `rev` our revision still shares."""
        first = self._first_cut_after(rev)
        return min(length, self.cuts[first][1]) if first < len(self.cuts) else length

    def _first_cut_after(self, rev: int) -> int:
        """Index of it; positions rise with revisions, so it is also the lowest one."""
        return bisect_right(self.cuts, rev, key=lambda cut: cut[0])

    def entry_at(self, position: int) -> LogEntry | None:
        """The entry that holds `position`, or None when it is not in `[start, end)`."""
        if not self.start <= position < self.end:
            return None
        return self._entries[bisect_right(self._positions, position) - 1]

    def bytes_between(self, start: int, end: int) -> int:
        """Payload bytes of the entries that begin in `[start, end)`."""
        return max(0, self._offset_at(end) - self._offset_at(start))

    def _offset_at(self, position: int) -> int:
        index = bisect_left(self._positions, position)
        return self._offsets[index] if index < len(self._offsets) else self._offset

    def tail_start(self, num_bytes: int) -> int:
        """Where the last entries begin that have at most so many bytes together.

        Positions would not do: at the last hop a long prompt has one row, an answer all.
        """
        index = bisect_left(self._offsets, self._offset - num_bytes)
        return self._positions[index] if index < len(self._positions) else self.end

    def trim(self, start: int) -> None:
        """Forget whole entries before `start` to free memory; `end` stays."""
        count = 0
        while count < len(self._entries) and self._entries[count].end <= start:
            self.num_bytes -= self._entries[count].payload_bytes
            count += 1
        del self._entries[:count], self._positions[:count], self._offsets[:count]
        self.start = self._positions[0] if self._positions else self.end

    def restart(self, start: int) -> None:
        """Forget all entries: the log begins again, empty, at `start`."""
        for table in (self._entries, self._positions, self._offsets):
            table.clear()
        self.num_bytes = 0
        self.start = self.end = start

    def fork(self, rev: int, length: int) -> Log:
        """A new log at revision 0 with the first positions, as `rev` had them.

        Entries are shared, not copied: they are immutable.
        """
        end = self.valid_length(rev, min(length, self.end)) if rev <= self.rev else 0
        child = Log(min(self.start, end))
        for entry in self._entries:
            if entry.position >= end:
                break
            child.append(entry.head(end))
        return child

    def _drop_from(self, position: int) -> None:
        while self._entries and self._entries[-1].end > position:
            entry = self._entries.pop()
            self._positions.pop()
            self._offset = self._offsets.pop()
            self.num_bytes -= entry.payload_bytes
            self.end = entry.position
            if entry.position < position:
                self.append(entry.head(position))
                return
        self.end = min(self.end, position)
        self.start = min(self.start, self.end)
