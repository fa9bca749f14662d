"""One hop's state: whatever comes in which order, its lengths agree and its rows are right."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.backend import SequenceId
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.link.inbound import Verdict
from shoal.link.log import Log, LogEntry
from shoal.link.outbound import Outbound
from shoal.server.session import HopPlan, HopSession
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE

SESSION = SessionId(b"s" * 16)
OWNER, BEFORE, AFTER = PeerId(b"o" * 32), PeerId(b"b" * 32), PeerId(b"a" * 32)
WANTS = (WANT_ALL, WANT_LAST, WANT_NONE)


def make_plan(*, is_last=False, epoch=1):
    return HopPlan(
        session=SESSION, owner=OWNER, opened_ms=1, epoch=epoch, span=Span(0, 2),
        predecessor=BEFORE, successor=AFTER, is_last=is_last, encoding="float32",
    )  # fmt: skip


class World:
    """A hop, the hop before it, and a backend that gives back the rows it gets."""

    def __init__(self, *, is_last, coarse):
        self.hop = HopSession(make_plan(is_last=is_last), SequenceId(1), window_bytes=16)
        self.source = Log()
        self.truth = []
        """(row, whether the client wants it) of each position."""
        self.cache = b""
        self._coarse = coarse
        self._next_row = 0

    def append(self, count, want=WANT_ALL):
        rows = bytes((self._next_row + i) % 256 for i in range(count))
        self._next_row += count
        self.source.append(
            LogEntry(
                position=self.source.end, count=count, call_count=count, want=want,
                encoding="float32", num_rows=count, payload=rows, payload_bytes=count,
            )
        )  # fmt: skip
        wanted = {WANT_ALL: count, WANT_LAST: 1, WANT_NONE: 0}[want]
        self.truth += [(row, index >= count - wanted) for index, row in enumerate(rows)]

    def truncate(self, count, want=WANT_ALL):
        length = max(0, len(self.truth) - count)
        rev = self.source.rev + 1
        self.source.cut(rev, [(rev, length)])
        del self.truth[length:]

    def arrive(self, *_):
        """The next rows that the hop does not have."""
        link = Outbound(SESSION, 0, self.source)
        link.reroute(AFTER, 1)
        link.on_have(1, self.hop.inbound.rev, self.hop.inbound.have, 1 << 20, 0)
        item = link.next_entry()
        if item is None:
            return False
        admission = self.hop.admit(BEFORE, item.header, item.entry.data())
        assert admission.verdict is Verdict.ACCEPTED
        return True

    def settle(self, *_):
        """Between iterations: truncations that are due."""
        length = self.hop.due_truncation()
        if length is not None:
            actual = length - length % self._coarse if length < len(self.cache) else length
            self.cache = self.cache[:actual]
            self.hop.cache_was_cut(length, actual)

    def begin(self, *_):
        if not self.hop.running and self.hop.queue:
            self.settle()
            if not self.hop.queue:
                return
            self.calls = self.hop.next_calls(self.hop.next_count(calls_max=3))
            position = len(self.cache)
            assert position == self.hop.cache_length
            for call in self.calls:
                assert call.position == position
                position += call.count

    def commit(self, *_):
        if self.hop.running:
            call = self.calls.pop(0)
            rows = bytes(call.payload)
            self.cache += rows
            self.hop.commit(rows[len(rows) - call.rows_wanted :])

    def lose_cache(self, count, *_):
        self.hop.lose_cache(max(0, self.hop.inbound.have - count))

    def lose_log(self, count, *_):
        """The successor needs rows that were trimmed."""
        log = self.hop.log
        log.trim(log.end - 1)
        if log.start:
            length = max(0, log.start - count)
            self.hop.lose_log(length)
            assert log.start == log.end == length

    def finish(self):
        for _ in range(1000):
            self.commit()
            self.hop.check_integrity()
            self.settle()
            self.hop.check_integrity()
            if self.hop.queue:
                self.begin()
            elif not self.arrive():
                return

    def check_rows(self):
        """What the hop passes on is what came in."""
        log = self.hop.log
        assert log.end == len(self.truth)
        for entry in log:
            data = bytes(entry.data())
            part = self.truth[entry.position : entry.end]
            if self.hop.plan.is_last:
                assert data == bytes(row for row, is_wanted in part if is_wanted)
            else:
                assert data == bytes(row for row, _ in part)


steps_of_a_hop = st.lists(
    st.tuples(
        st.sampled_from(
            ["append", "append", "arrive", "arrive", "begin", "begin", "commit", "commit",
             "settle", "truncate", "lose_cache", "lose_log"]
        ),
        st.integers(1, 6),
        st.sampled_from(WANTS),
    ),
    min_size=30,  # shorter ones by chance hardly ever lead anywhere
    max_size=80,
)  # fmt: skip


@settings(max_examples=300)
@given(steps_of_a_hop, st.booleans(), st.sampled_from([1, 4]))
def test_lengths_agree_after_every_step_and_rows_at_the_end(steps, is_last, coarse):
    world = World(is_last=is_last, coarse=coarse)
    for kind, count, want in steps:
        getattr(world, kind)(count, want)
        world.hop.check_integrity()
    world.append(1)  # truncations travel with rows
    world.finish()
    assert world.hop.inbound.rev == world.source.rev
    assert world.cache == bytes(row for row, _ in world.truth)
    world.check_rows()


def test_rows_are_acknowledged_by_the_quarter_window():
    world = World(is_last=False, coarse=1)
    for _ in range(4):
        world.append(3)
    acks = []
    for _ in range(4):
        world.arrive()
        world.begin()
        world.commit()
        acks.append(world.hop.take_ack())
    assert acks == [None, 6, None, 12]


def test_a_replay_fills_the_cache_and_sends_nothing():
    world = World(is_last=False, coarse=1)
    world.append(4)
    world.finish()
    before = list(world.hop.log)
    world.lose_cache(4)
    world.arrive()
    world.begin()
    assert [call.rows_wanted for call in world.calls] == [0]
    world.commit()
    assert list(world.hop.log) == before


def test_a_new_route_changes_the_neighbours_only():
    world = World(is_last=False, coarse=1)
    world.append(4)
    world.finish()
    world.hop.follow(make_plan(epoch=2))
    assert world.hop.inbound.is_from_predecessor(BEFORE, 2)
    assert not world.hop.outbound.is_open
    assert (world.hop.inbound.have, world.hop.log.end) == (4, 4)


def test_a_fork_starts_with_its_parents_rows():
    world = World(is_last=False, coarse=1)
    world.append(4)
    world.finish()
    child = HopSession(make_plan(), SequenceId(2))
    child.start_from(world.hop.log.fork(0, 3))
    child.check_integrity()
    assert (child.inbound.have, child.cache_length, child.log.end) == (3, 3, 3)
