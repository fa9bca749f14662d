"""The engine's iterations: what runs together, who gives way, and what a failure costs."""

import asyncio

from shoal.base.errors import BadInput, InternalError, SessionTooLong
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.toy_backend import ToyBackend, ToyConfig, fixed_pace
from shoal.lab.toy_blocks import ToySequence, toy_embedding
from shoal.server.engine import Engine, EngineLimits, Pace
from shoal.server.quotas import Quotas
from shoal.server.session import HopPlan
from shoal.server.sessions import SessionTable
from shoal.wire.messages import WANT_ALL, Entry

PAGE = 16
SPAN = Span(0, 2)
ROW_BYTES = 64


class Bench:
    """An engine with toy blocks; `feed` is the predecessor, the events are kept."""

    def __init__(self, *, pages=64, fault=None, limits=None, coarse=1):
        self.backend = ToyBackend(
            ToyConfig(
                span=SPAN, num_blocks=2, cache_tokens=pages * PAGE, page_tokens=PAGE,
                coarse_truncate=coarse,
            ),
            pace=self._pace, fault=fault,
        )  # fmt: skip
        self.table = SessionTable(
            self.backend, window_bytes=1 << 20, quotas=Quotas(cache_share=1.0)
        )
        self.engine = Engine(self.backend, self.table, self, limits or EngineLimits())
        self.batches, self.failed, self.held = [], [], []

    async def __aenter__(self):
        self.task = asyncio.ensure_future(self.engine.run())
        return self

    async def __aexit__(self, *exc):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _pace(self, calls):
        self.batches.append([(call.sequence, call.position, call.count) for call in calls])
        await fixed_pace(per_run_s=0.01)(calls)

    async def open(self, opened_ms):
        owner = PeerId(b"o" * 32)
        plan = HopPlan(
            session=SessionId(bytes([opened_ms]) * 16), owner=owner, opened_ms=opened_ms, epoch=1,
            span=SPAN, predecessor=owner, successor=owner, is_last=True, encoding="float32",
        )  # fmt: skip
        async with self.engine.exclusive():
            return self.table.open(plan, None, asyncio.get_running_loop().time())

    def feed(self, hop, count, position=None):
        """Rows arrive, from where the hop is unless said otherwise."""
        position = hop.inbound.have if position is None else position
        rows = b"".join(map(toy_embedding, range(position, position + count)))
        header = Entry(
            hop.plan.session, 0, 1, 0, 0, [], position, count, count, WANT_ALL, "float32",
            len(rows),
        )  # fmt: skip
        hop.used_s = asyncio.get_running_loop().time()
        hop.admit(hop.plan.predecessor, header, rows)
        self.engine.wake()

    async def fed(self, count):
        """A session that got so many rows, each an entry of its own, and all that may run did."""
        hop = await self.open(1)
        for _ in range(count):
            self.feed(hop, 1)
        await self.settle()
        return hop

    async def settle(self, seconds=1.0):
        await asyncio.sleep(seconds)
        assert not self.task.done(), "the engine ended"
        for hop in self.table:
            hop.check_integrity()

    # --- EngineEvents ---

    def on_output(self, hop):
        """The log grew."""

    def on_worked_off(self, hop):
        """Rows were worked off."""

    def on_held_changed(self, hop):
        self.held.append(hop)

    def on_failed(self, hop, error):
        self.failed.append((hop, error))
        self.table.close(hop)


def outputs(count):
    """What one machine says to the first rows."""
    blocks = ToySequence(SPAN)
    return b"".join(blocks.push(toy_embedding(position)) for position in range(count))


def logged(hop):
    return b"".join(bytes(entry.data()) for entry in hop.log)


def test_a_session_that_loses_its_cache_to_another_of_its_batch():
    """It is left out of this batch and comes back later; the others don't notice.

    The youngest may not give way, because it is in the batch already. So the middle one
    must, whose turn would come next.
    """

    async def story():
        async with Bench(pages=16) as it:
            young, middle, old = [await it.open(ms) for ms in (3, 2, 1)]
            it.feed(old, PAGE)
            it.feed(middle, 5 * PAGE)
            it.feed(young, 10 * PAGE - 1)
            await it.settle()
            assert it.table.ledger.free == 0
            it.feed(young, 1)
            it.feed(old, 1)
            it.feed(middle, 8)
            await it.settle()
            assert logged(old) == outputs(PAGE + 1)
            assert logged(young) == outputs(10 * PAGE)
            assert not it.failed
            # the middle one is older than the youngest: it returned in its place
            assert young.is_parked
            assert not middle.is_parked
            assert middle in it.held
            it.feed(middle, 5 * PAGE + 8, position=0)
            await it.settle()
            assert logged(middle) == outputs(5 * PAGE + 8)

    run_virtual(story)


def test_a_parked_session_waits_until_there_is_room():
    async def story():
        async with Bench(pages=8) as it:
            old, young = await it.open(1), await it.open(2)
            it.feed(young, PAGE)
            it.feed(old, 6 * PAGE)
            await it.settle()
            it.feed(young, 1)
            it.feed(old, PAGE)
            await it.settle()
            it.feed(old, PAGE)
            await it.settle()
            assert young.is_parked
            young.wants_return = True
            it.engine.wake()
            await it.settle(5.0)
            assert young.is_parked
            it.table.close(old)
            it.engine.wake()
            await it.settle()
            assert not young.is_parked
            assert young in it.held
            it.feed(young, PAGE + 1, position=0)
            await it.settle()
            assert logged(young) == outputs(PAGE + 1)

    run_virtual(story)


def test_a_session_that_fits_nowhere_fails_alone():
    async def story():
        async with Bench(pages=4) as it:
            large, small = await it.open(1), await it.open(2)
            it.feed(large, 5 * PAGE)
            it.feed(small, 3)
            await it.settle()
            ((hop, error),) = it.failed
            assert hop is large
            assert isinstance(error, SessionTooLong)
            assert logged(small) == outputs(3)

    run_virtual(story)


def test_a_call_that_raises_fails_alone():
    def fault(call):
        return "raise" if call.position == 7 else None

    async def story():
        async with Bench(fault=fault) as it:
            hops = [await it.open(ms) for ms in (1, 2, 3)]
            for hop, count in zip(hops, (5, 7, 9), strict=True):
                it.feed(hop, count)
            await it.settle()
            for hop in hops:
                it.feed(hop, 1)
            await it.settle()
            ((hop, error),) = it.failed
            assert hop is hops[1]
            assert isinstance(error, InternalError)
            assert logged(hops[0]) == outputs(6)
            assert logged(hops[2]) == outputs(10)

    run_virtual(story)


def test_bad_rows_are_their_sessions_own():
    def fault(call):
        return "bad_row" if call.count == 2 else None

    async def story():
        async with Bench(fault=fault) as it:
            good, bad = await it.open(1), await it.open(2)
            it.feed(good, 3)
            it.feed(bad, 2)
            await it.settle()
            ((hop, error),) = it.failed
            assert (hop, type(error)) == (bad, BadInput)
            assert len(it.batches) == 1
            assert logged(good) == outputs(3)

    run_virtual(story)


def test_a_prompt_is_chunked_by_the_budget_and_decodes_go_along():
    async def story():
        async with Bench(limits=EngineLimits(budget_tokens=32)) as it:
            prompt, decode = await it.open(1), await it.open(2)
            it.feed(decode, 5)
            await it.settle()
            it.batches.clear()
            for _ in range(3):
                it.feed(prompt, 31)
            it.feed(decode, 1)
            await it.settle()
            sizes = [sorted(count for _, _, count in batch) for batch in it.batches]
            assert sizes == [[1, 31], [31], [31]]

    run_virtual(story)


def test_a_session_whose_successor_is_slow_waits():
    """Nobody takes its rows: it runs ahead by a few of them and no further."""
    limits = EngineLimits(run_ahead_bytes=4 * ROW_BYTES)

    async def story():
        async with Bench(limits=limits) as it:
            hop = await it.fed(20)
            assert hop.log.end == 8
            hop.outbound.on_have(1, 0, 5, 1 << 20, 5)
            it.engine.wake()
            await it.settle()
            assert hop.log.end == 12

    run_virtual(story)


def test_small_entries_that_wait_share_a_run_as_a_replay_needs():
    """Four at a time (what the backend takes), in order; a chunk goes alone."""

    async def story():
        async with Bench() as it:
            hop = await it.open(1)
            for count in (1, 1, 1, 1, 1, 40, 1):
                it.feed(hop, count)
            await it.settle()
            assert [[call[1] for call in batch] for batch in it.batches] == [
                [0, 1, 2, 3], [4], [5], [45],
            ]  # fmt: skip
            assert logged(hop) == outputs(46)
            assert [entry.count for entry in hop.log] == [1, 1, 1, 1, 1, 40, 1]

    run_virtual(story)


def test_a_replay_that_finds_no_room_for_a_full_run_goes_entry_by_entry():
    async def story():
        async with Bench(pages=2) as it:
            old, young = await it.open(1), await it.open(2)
            it.feed(old, PAGE - 1)
            it.feed(young, 1)
            await it.settle()
            for _ in range(4):
                it.feed(young, 1)
                it.feed(old, 1)
            await it.settle()
            assert not it.failed
            assert old.log.end == PAGE + 3
            assert logged(old) == outputs(PAGE + 3)

    run_virtual(story)


def test_what_follows_a_bad_entry_in_a_run_is_not_committed():
    def fault(call):
        return "bad_row" if call.position == 2 else None

    async def story():
        async with Bench(fault=fault) as it:
            hop = await it.fed(4)
            assert [type(error) for _, error in it.failed] == [BadInput]
            assert logged(hop) == outputs(2)

    run_virtual(story)


def test_a_failed_run_of_several_entries_is_redone_in_order():
    failures = iter(["raise"])

    def fault(call):
        return next(failures, None) if call.position == 2 else None

    async def story():
        async with Bench(fault=fault) as it:
            hop = await it.fed(4)
            assert not it.failed
            assert logged(hop) == outputs(4)

    run_virtual(story)


def test_a_long_log_is_trimmed_only_where_it_was_acknowledged():
    limits = EngineLimits(log_bytes_per_session_max=8 * ROW_BYTES)

    async def story():
        async with Bench(limits=limits) as it:
            hop = await it.fed(20)
            assert (hop.log.start, hop.log.end) == (0, 20)
            hop.outbound.on_have(1, 0, 20, 1 << 20, 3)
            it.feed(hop, 1)
            await it.settle()
            assert (hop.log.start, hop.log.end) == (3, 21)

    run_virtual(story)


def test_a_session_closed_while_it_runs():
    async def story():
        async with Bench() as it:
            gone, kept = await it.open(1), await it.open(2)
            it.feed(gone, 5)
            it.feed(kept, 5)
            await asyncio.sleep(0.005)
            assert gone.running
            it.table.close(gone)
            await it.settle()
            assert it.table.ledger.holders() == {kept.sequence}
            assert set(it.backend.lengths) == {kept.sequence}
            assert not gone.log.end
            assert logged(kept) == outputs(5)

    run_virtual(story)


def test_the_pace_judges_by_the_slowest_of_late():
    pace = Pace()
    assert pace.estimate_s(100) == 0.0
    pace.add(1, 5.0)
    for _ in range(16):
        pace.add(10, 0.1)
    assert pace.estimate_s(1) == 0.1
    assert abs(pace.estimate_s(100) - 1.0) < 1e-9


def test_busy_time_is_that_of_iterations_and_rows_are_counted():
    async def scenario():
        async with Bench() as bench:
            hop = await bench.open(1)
            bench.feed(hop, 3)
            await bench.settle()
            now_s = asyncio.get_running_loop().time()
            assert bench.engine.rows == 3
            assert abs(bench.engine.busy_s(now_s) - 0.01 * bench.engine.iteration) < 1e-9
            await bench.settle(5.0)
            assert bench.engine.busy_s(now_s + 5) == bench.engine.busy_s(now_s)

    run_virtual(scenario())
