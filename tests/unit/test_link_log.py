"""The log against a naive one that keeps every row in a list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.limits import CUTS_MAX
from shoal.link.log import Log, LogEntry, rows_of
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE

ROW = 4
WANTS = (WANT_ALL, WANT_LAST, WANT_NONE)


def row(number):
    return number.to_bytes(ROW, "little")


def make_entry(position, rows, want=WANT_ALL):
    """Rows as they are kept: all, the last or none of them."""
    kept = rows[len(rows) - rows_of(want, len(rows)) :]
    return LogEntry(
        position=position,
        count=len(rows),
        call_count=len(rows),
        want=want,
        encoding="float32",
        num_rows=len(kept),
        payload=b"".join(kept),
        payload_bytes=ROW * len(kept),
    )


def rows_in(entry):
    """What the entry holds at each position; None where it holds nothing."""
    data = bytes(entry.data())
    kept = [data[i : i + ROW] for i in range(0, len(data), ROW)]
    assert len(kept) == entry.num_rows
    assert len(data) == entry.payload_bytes
    return [None] * (entry.count - len(kept)) + kept


class NaiveLog:
    """The same in the simplest way: a list of [position, rows]."""

    def __init__(self, start=0):
        self.rev, self.start, self.end = 0, start, start
        self.entries, self.cuts = [], []

    def append(self, rows):
        self.entries.append((self.end, rows))
        self.end += len(rows)

    def cut(self, rev, position):
        self.rev = rev
        self.cuts.append((rev, position))
        self.entries = [(at, rows[: position - at]) for at, rows in self.entries if at < position]
        self.end = min(self.end, position)
        self.start = min(self.start, self.end)

    def trim(self, start):
        while self.entries and sum(self._ends()[:1]) <= start:
            del self.entries[0]
        self.start = self.entries[0][0] if self.entries else self.end

    def _ends(self):
        return [at + len(rows) for at, rows in self.entries]

    def valid_length(self, rev, length):
        return min([length, *(at for cut_rev, at in self.cuts if cut_rev > rev)])

    def bytes_between(self, start, end):
        held = [rows for at, rows in self.entries if start <= at < end]
        return sum(ROW for rows in held for one in rows if one is not None)


def check_equal(log, naive):
    assert (log.rev, log.start, log.end) == (naive.rev, naive.start, naive.end)
    assert [(entry.position, rows_in(entry)) for entry in log] == naive.entries
    assert log.num_bytes == naive.bytes_between(0, 1 << 30)
    for position in range(-1, naive.end + 2):
        entry = log.entry_at(position)
        inside = naive.start <= position < naive.end
        assert (entry is not None) == inside
        if entry is not None:
            assert entry.position <= position < entry.end


numbers = st.integers(0, 40)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6), st.sampled_from(WANTS)),
        st.tuples(st.just("cut"), numbers, st.integers(1, 3)),
        st.tuples(st.just("trim"), numbers),
    ),
    min_size=8,
    max_size=40,
)


def play(steps):
    log, naive, count = Log(), NaiveLog(), 0
    for kind, number, *more in steps:
        if kind == "append":
            rows = [row(count + i) for i in range(number)]
            count += number
            entry = make_entry(log.end, rows, more[0])
            log.append(entry)
            naive.append(rows_in(entry))
        elif kind == "cut":
            rev = log.rev + more[0]
            log.cut(rev, [(rev, number)])
            naive.cut(rev, number)
        else:
            log.trim(number)
            naive.trim(number)
        check_equal(log, naive)
    return log, naive


@given(operations)
def test_entries_lengths_and_bytes(steps):
    play(steps)


@given(operations, numbers, numbers)
def test_bytes_between(steps, start, end):
    log, naive = play(steps)
    assert log.bytes_between(start, end) == naive.bytes_between(start, end)


@given(operations, st.integers(0, 20), numbers)
def test_valid_length(steps, rev, length):
    log, naive = play(steps)
    assert log.valid_length(rev, length) == naive.valid_length(rev, length)


@given(operations, st.integers(0, 20), numbers)
def test_a_receiver_that_is_told_the_cuts_keeps_what_is_valid(steps, rev, length):
    log, naive = play(steps)
    cuts = log.cuts_after(rev)
    kept = min([length, *(position for _, position in cuts)])
    assert kept == naive.valid_length(rev, length)
    assert [cut_rev for cut_rev, _ in cuts] == sorted(cut_rev for cut_rev, _ in cuts)


@given(operations, st.integers(0, 20), numbers)
def test_a_fork_has_the_first_rows(steps, rev, length):
    log, naive = play(steps)
    child = log.fork(rev, length)
    end = naive.valid_length(rev, min(length, naive.end)) if rev <= naive.rev else 0
    assert (child.rev, child.cuts) == (0, [])
    expected = NaiveLog(min(naive.start, end))
    expected.entries = [(at, rows[: end - at]) for at, rows in naive.entries if at < end]
    expected.end = end
    check_equal(child, expected)
    child.append(make_entry(child.end, [row(999)]))
    check_equal(log, naive)


@given(st.integers(CUTS_MAX, 3 * CUTS_MAX), st.integers(0, 250))
def test_old_cuts_are_merged_into_one_that_is_safe(count, rev):
    """Who is told of a merged cut loses at least what it must, and at most a bit more."""
    log = Log()
    log.append(make_entry(0, [row(i) for i in range(400)]))
    for number in range(1, count + 1):
        log.cut(number, [(number, 100 + number)])
    told = log.cuts_after(rev)
    assert len(told) == min(CUTS_MAX, max(0, count - rev))
    valid = log.valid_length(rev, 1000)
    assert min([1000, *(position for _, position in told)]) == valid
    for later in range(rev, count):
        kept = min(position for cut_rev, position in told if cut_rev > later)
        assert kept <= log.valid_length(later, 1000)


@given(st.sampled_from(WANTS), st.integers(1, 8), st.data())
def test_head_and_tail_of_an_entry(want, count, data):
    entry = make_entry(10, [row(i) for i in range(count)], want)
    cut = data.draw(st.integers(11, 10 + count))
    skip = data.draw(st.integers(10, cut - 1))
    part = entry.head(cut).tail(skip)
    assert (part.position, part.end, part.call_count) == (skip, cut, count)
    assert rows_in(part) == rows_in(entry)[skip - 10 : cut - 10]
    assert part.num_rows == rows_of(part.want, part.count)


def test_rows_made_on_demand_are_made_for_the_part_that_is_sent():
    def make(position, count):
        return b"".join(row(position + i) for i in range(count))

    entry = LogEntry(
        position=5, count=10, call_count=10, want=WANT_ALL, encoding="float32",
        num_rows=10, payload=make, payload_bytes=10 * ROW,
    )  # fmt: skip
    assert rows_in(entry.head(9).tail(7)) == [row(7), row(8)]


def test_old_cuts_are_not_made_again():
    log = Log()
    log.append(make_entry(0, [row(i) for i in range(10)]))
    log.cut(2, [(2, 8), (1, 9)])
    log.append(make_entry(8, [row(100)]))
    log.cut(2, [(1, 0), (2, 0)])
    assert (log.rev, log.end) == (2, 9)


def test_restart_begins_empty_somewhere_else():
    log = Log()
    log.append(make_entry(0, [row(i) for i in range(10)]))
    log.restart(4)
    assert (log.start, log.end, log.num_bytes, list(log)) == (4, 4, 0, [])
    log.append(make_entry(4, [row(4)]))
    assert log.end == 5


def test_a_gap_is_refused():
    log = Log()
    with pytest.raises(ValueError, match="log ends at 0"):
        log.append(make_entry(1, [row(0)]))


@pytest.mark.parametrize(
    ("num_bytes", "start"), [(0, 6), (3, 6), (4, 5), (7, 5), (8, 4), (11, 4), (20, 0), (99, 0)]
)
def test_where_the_last_bytes_begin(num_bytes, start):
    """Entries [0, 3) of 12 bytes, [3, 4) of none, [4, 5) and [5, 6) of 4."""
    log = Log()
    for position, count, want in ((0, 3, WANT_ALL), (3, 1, WANT_NONE), (4, 1, WANT_ALL)):
        log.append(make_entry(position, [row(0)] * count, want))
    log.append(make_entry(5, [row(0)]))
    assert log.tail_start(num_bytes) == (3 if start == 4 else start)
    log.trim(4)
    assert log.tail_start(num_bytes) == max(4, start)
