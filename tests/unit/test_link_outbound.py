"""The sending end of a link, alone and with the receiving end behind a lossy channel."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import PAYLOAD_BYTES_MAX
from shoal.link.inbound import Inbound, Verdict
from shoal.link.log import Log, LogEntry
from shoal.link.outbound import Outbound
from shoal.wire.messages import WANT_ALL, Ack, Entry, Gap, Have, Open, Stale

SESSION = SessionId(b"s" * 16)
SENDER, RECEIVER = PeerId(b"S" * 32), PeerId(b"R" * 32)
WINDOW = 5
ENTRY_MAX = 4


def make_entry(position, rows):
    return LogEntry(
        position=position, count=len(rows), call_count=len(rows), want=WANT_ALL,
        encoding="float32", num_rows=len(rows), payload=rows, payload_bytes=len(rows),
    )  # fmt: skip


def open_outbound(log, *, window_bytes=1 << 20):
    outbound = Outbound(SESSION, 2, log)
    outbound.reroute(RECEIVER, 1)
    outbound.on_have(1, 0, 0, window_bytes, 0)
    return outbound


def log_of(*sizes):
    log = Log()
    for size in sizes:
        log.append(make_entry(log.end, bytes(size)))
    return log


class Pair:
    """Both ends of one link. Rows are one byte each; the channel keeps the order."""

    def __init__(self):
        self.log = Log()
        self.outbound = Outbound(SESSION, 2, self.log)
        self.inbound = Inbound(SESSION, 2)
        self.truth, self.rows = b"", b""
        self.worked_off = 0
        self.next_row = 0
        self.there, self.back = deque(), deque()
        self.epoch = 0
        self.reroute()

    # --- at the sender ---

    def reroute(self):
        self.epoch += 1
        self.outbound.reroute(RECEIVER, self.epoch)
        self.there.append((("route", self.epoch), b""))
        self.there.append((Open(SESSION, 2, self.epoch), b""))

    def append(self, count):
        rows = bytes((self.next_row + i) % 256 for i in range(count))
        self.next_row += count
        self.log.append(make_entry(self.log.end, rows))
        self.truth += rows

    def truncate(self, count):
        length = max(0, len(self.truth) - count)
        rev = self.log.rev + 1
        self.log.cut(rev, [(rev, length)])
        self.outbound.on_cut()
        self.truth = self.truth[:length]

    def send(self):
        item = self.outbound.next_entry()
        if item is not None:
            self.there.append((item.header, bytes(item.entry.data())))

    def take_answer(self):
        match self.back.popleft():
            case Have() as m:
                self.outbound.on_have(m.epoch, m.rev, m.length, m.window_bytes, m.worked_off)
            case Gap() as m:
                self.outbound.on_gap(m.epoch, m.rev, m.length)
            case Ack() as m:
                self.outbound.on_ack(m.epoch, m.rev, m.length)
            case Stale() as m:
                self.outbound.on_stale(m.epoch)

    # --- at the receiver ---

    def have(self):
        self.back.append(self.inbound.have_message(WINDOW, self.worked_off))

    def deliver(self):
        message, payload = self.there.popleft()
        match message:
            case ("route", epoch):
                if epoch > self.inbound.epoch:
                    self.inbound.reroute(SENDER, epoch)
                    self.have()
            case Open(epoch=epoch):
                if self.inbound.is_from_predecessor(SENDER, epoch):
                    self.have()
                else:
                    self.back.append(self.inbound.stale_message())
            case Entry():
                self.admit(message, payload)

    def admit(self, header, payload):
        admission = self.inbound.admit(SENDER, header, payload)
        self.keep(min([len(self.rows), *(position for _, position in admission.cuts)]))
        match admission.verdict:
            case Verdict.ACCEPTED:
                assert admission.entry.position == len(self.rows)
                self.rows += bytes(admission.entry.data())
            case Verdict.GAP:
                self.back.append(self.inbound.gap_message())
            case Verdict.STALE:
                self.back.append(self.inbound.stale_message())
            case Verdict.HELD:
                self.back.append(self.inbound.ack_message(self.worked_off))

    def keep(self, length):
        self.rows = self.rows[:length]
        self.worked_off = min(self.worked_off, length)

    def work(self, count):
        self.worked_off = min(len(self.rows), self.worked_off + count)
        self.back.append(self.inbound.ack_message(self.worked_off))

    def forget(self, count):
        self.keep(max(0, len(self.rows) - count))
        self.inbound.lower(len(self.rows))
        self.have()

    # --- both ---

    def check(self):
        assert self.inbound.have == len(self.rows)
        if self.inbound.rev == self.log.rev:
            assert self.rows == self.truth[: len(self.rows)]
        assert len(self.rows) - self.worked_off <= WINDOW + 2 * ENTRY_MAX
        assert 0 <= self.outbound.acked <= self.outbound.cursor <= self.log.end

    def finish(self):
        """Without further losses everything arrives."""
        self.reroute()
        for _ in range(1000):
            self.send()
            if self.there:
                self.deliver()
            elif self.back:
                self.take_answer()
            elif self.worked_off < len(self.rows):
                self.work(WINDOW)
            elif not self.outbound.has_entry:
                break
            self.check()
        # cut off rows travel with the next ones: until then the receiver may hold more
        assert self.rows[: len(self.truth)] == self.truth


actions = ["append", "append", "truncate", "work", "forget", "reroute"]
actions += ["send", "deliver", "answer"] * 4 + ["lose", "lose answer"]
pair_operations = st.lists(
    st.tuples(st.sampled_from(actions), st.integers(1, ENTRY_MAX)),
    min_size=40,  # shorter ones by chance hardly ever lead anywhere
    max_size=150,
)


@settings(max_examples=300)
@given(pair_operations)
def test_both_ends_become_equal_whatever_is_lost(steps):
    pair = Pair()
    for kind, number in steps:
        match kind:
            case "append" | "truncate" | "work" | "forget":
                getattr(pair, kind)(number)
            case "send" | "reroute":
                getattr(pair, kind)()
            case "deliver" if pair.there:
                pair.deliver()
            case "answer" if pair.back:
                pair.take_answer()
            case "lose" if pair.there and isinstance(pair.there[0][0], Entry | Open):
                pair.there.popleft()
            case "lose answer" if pair.back:
                pair.back.popleft()
        pair.check()
    pair.finish()


# --- alone ------------------------------------------------------------------------------


def test_nothing_is_sent_before_the_receiver_said_what_it_has():
    outbound = Outbound(SESSION, 2, log_of(3))
    outbound.reroute(RECEIVER, 1)
    assert outbound.next_entry() is None
    assert not outbound.on_have(2, 0, 0, 100, 0)
    assert outbound.next_entry() is None
    assert outbound.on_have(1, 0, 1, 100, 0)
    assert outbound.next_entry().header.position == 1


def test_asking_again_opens_no_new_window():
    outbound = open_outbound(log_of(*[4] * 10), window_bytes=8)
    while outbound.next_entry():
        pass
    assert outbound.cursor == 8
    outbound.on_have(1, 0, 8, 8, 0)
    assert outbound.next_entry() is None
    outbound.on_gap(1, 0, 8)
    assert outbound.next_entry() is None
    outbound.on_have(1, 0, 8, 8, 4)
    assert outbound.next_entry().header.position == 8
    assert outbound.next_entry() is None


def test_a_lower_epoch_waits_and_a_higher_one_ends_the_link():
    outbound = open_outbound(log_of(3))
    outbound.on_stale(0)
    assert not outbound.is_open
    assert outbound.on_have(1, 0, 0, 100, 0)
    outbound.on_stale(2)
    assert outbound.is_stale
    assert not outbound.on_have(1, 0, 0, 100, 0)
    outbound.reroute(RECEIVER, 3)
    assert outbound.on_have(3, 0, 0, 100, 0)


def test_rows_that_the_log_forgot_are_called_for():
    log = log_of(4, 4, 4)
    outbound = open_outbound(log)
    log.trim(8)
    assert outbound.needs_earlier
    assert outbound.next_entry() is None
    outbound.on_have(1, 0, 8, 100, 8)
    assert not outbound.needs_earlier
    assert outbound.next_entry().header.position == 8


def test_an_entry_too_large_for_a_frame_is_split():
    """Rows that were computed at once may be sent in parts."""
    rows, row_bytes = 8, PAYLOAD_BYTES_MAX // 4
    log = Log()
    log.append(
        LogEntry(
            position=0, count=rows, call_count=rows, want=WANT_ALL, encoding="float32",
            num_rows=rows, payload=lambda position, count: b"", payload_bytes=rows * row_bytes,
        )
    )  # fmt: skip
    outbound = open_outbound(log, window_bytes=1 << 40)
    assert outbound.next_size()[0] == PAYLOAD_BYTES_MAX
    parts = [outbound.next_entry().header for _ in range(2)]
    assert [(part.position, part.count) for part in parts] == [(0, 4), (4, 4)]
    assert all(part.payload_bytes == PAYLOAD_BYTES_MAX for part in parts)
    assert all(part.call_count == rows for part in parts)
    assert outbound.next_entry() is None


def test_a_standby_gets_rows_when_enough_wait_and_then_all_of_them():
    log = log_of(1, 1, 1)
    outbound = open_outbound(log)
    outbound.lag_rows = 4
    assert not outbound.has_entry
    for position in (3, 4):
        log.append(make_entry(position, b"x"))
    assert [outbound.next_entry().entry.position for _ in range(5)] == [0, 1, 2, 3, 4]
    log.append(make_entry(5, b"x"))
    assert not outbound.has_entry
    outbound.lag_rows = 0
    assert outbound.has_entry
