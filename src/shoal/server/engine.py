"""The loop that runs blocks: choose a batch, run it, commit what succeeded.

Between iterations, and only then, sessions are opened, forked, cut and closed in the
backend (`exclusive`). A batch that fails as a whole is run again one call at a time, so
that one bad row never costs another session anything.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Final, NamedTuple, Protocol

from shoal.base.backend import BlockBackend, Call, Outcome, SequenceId
from shoal.base.errors import InternalError, SessionLost, SessionTooLong, ShoalError
from shoal.base.limits import LOG_BYTES_PER_SESSION_MAX, RUN_AHEAD_BYTES
from shoal.plan.refresh import PASSES_MIN, Pass
from shoal.server.fairness import FairLimits, Fairness, Ran
from shoal.server.quotas import Rates
from shoal.server.scheduler import Waiting, choose_batch
from shoal.server.session import HopSession, SessionKey
from shoal.server.sessions import RETURN_MARGIN_TOKENS, SessionTable

logger = logging.getLogger(__name__)

ROOM_POLL_S: Final = 1.0
"""Sessions become victims by idling, which wakes nobody: who waits for room looks this often."""


PASSED_OVER_MAX: Final = 8
"""Iterations without a chunk before one goes first, even if decode rows fill the budget."""


class _Work(NamedTuple):
    """What one session has in an iteration."""

    hop: HopSession
    calls: list[Call]
    is_decode: bool


class EngineEvents(Protocol):
    """What the server does when the engine moved a session."""

    def on_output(self, hop: HopSession) -> None:
        """The log grew."""

    def on_worked_off(self, hop: HopSession) -> None:
        """Queued rows were worked off: maybe acknowledge."""

    def on_held_changed(self, hop: HopSession) -> None:
        """The hop holds less (or may receive again): tell the predecessor."""

    def on_failed(self, hop: HopSession, error: ShoalError) -> None:
        """The session can't go on here."""


class GapWork(Protocol):
    """Work that runs between iterations, a small step at a time."""

    def is_due(self, now_s: float, *, is_idle: bool) -> bool:
        """Whether a step should run now; `is_idle`: no session has anything that could."""

    async def step(self) -> None:
        """Run a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of one server's engine."""

    budget_tokens: int = 512
    """Rows per iteration: a prompt delays others by at most this many rows' time."""
    run_ahead_bytes: int = RUN_AHEAD_BYTES
    log_bytes_per_session_max: int = LOG_BYTES_PER_SESSION_MAX
    fair: FairLimits = field(default_factory=FairLimits)


CHOICES_MAX: Final = 16
"""How often the rows of an iteration are chosen anew because some find no room in the cache."""

PASSES_KEPT: Final = 2 * PASSES_MIN
"""Passes that tell of the machine's pace: what was before is soon forgotten."""

PACE_S: Final = 60.0
"""How long decode times tell of the load: those of a server that fell idle say nothing."""


class Pace:
    """How long iterations take, to tell a slow one from a stuck one."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=16)
        self._decodes: deque[float] = deque(maxlen=16)
        self._decoded_s = 0.0
        self.passes: deque[Pass] = deque(maxlen=PASSES_KEPT)
        """The last that had nothing but decode rows."""

    def add(self, num_tokens: int, duration_s: float) -> None:
        """An iteration finished."""
        self._recent.append((num_tokens, duration_s))

    def add_decode(self, rows: int, duration_s: float, num_blocks: int, now_s: float) -> None:
        """It had nothing but decode rows, and ran so many blocks."""
        self._decodes.append(duration_s / num_blocks)
        self._decoded_s = now_s
        self.passes.append(Pass(rows, duration_s / num_blocks, now_s))

    def decode_s_per_block(self, now_s: float) -> float:
        """The median of recent iterations with nothing but decode rows; 0: there were none."""
        if not self._decodes or now_s - self._decoded_s > PACE_S:
            return 0.0
        return median(self._decodes)

    def estimate_s(self, num_tokens: int) -> float:
        """The longest that an iteration of this size should take, judged by recent ones."""
        return max(
            (duration * max(1.0, num_tokens / tokens) for tokens, duration in self._recent),
            default=0.0,
        )


class Engine:
    """Runs the backend for all sessions of one server."""

    def __init__(
        self,
        backend: BlockBackend,
        sessions: SessionTable,
        events: EngineEvents,
        limits: EngineLimits,
    ) -> None:
        self.iteration = 0
        self.running_tokens = 0
        self.running_since_s = 0.0
        self.rows = 0
        """Run so far."""
        self.pace = Pace()
        self._busy_s = 0.0
        self._backend = backend
        self._sessions = sessions
        self._events = events
        self._limits = limits
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._arrivals = itertools.count(1)
        self._since: dict[int, int] = {}
        self._fairness = Fairness(limits.fair)
        self._rates = Rates(sessions.quotas.bytes_per_s_per_client)
        self._held_s: float | None = None
        """How long rows that may not run yet must wait."""
        self._passed_over = 0
        """Iterations in a row in which chunks waited that might have run, and none did."""
        self._calls_max = backend.facts.calls_per_sequence_max
        self._gap_work: GapWork | None = None

    def fill_gaps(self, work: GapWork) -> None:
        """Run this work as well; `wake` when there is some."""
        self._gap_work = work

    def wake(self) -> None:
        """Something changed: rows came, a cursor moved, memory was freed."""
        self._wake.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """A moment between iterations, to open or fork sessions."""
        async with self._lock:
            self._settle()
            yield
        self._wake.set()

    def busy_s(self, now_s: float) -> float:
        """Seconds that iterations took so far, the running one included."""
        running_s = now_s - self.running_since_s if self.running_tokens else 0.0
        return self._busy_s + running_s

    @property
    def queued_tokens(self) -> int:
        """Rows that wait, over all sessions."""
        return sum(hop.waiting_tokens for hop in self._sessions)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            Exception: a bug of ours or the backend's between iterations; the server
                can't go on.
        """
        while True:
            await self._wait()
            self._wake.clear()
            is_busy = True
            while is_busy:
                has_run = await self._iterate()
                # Rows that are held back for the sake of others are no reason to go on.
                is_idle = not has_run and self._held_s is None
                if has_run:
                    await asyncio.sleep(0)  # rows leave before the next ones are chosen
                is_busy = await self._fill_gap(is_idle=is_idle) or has_run

    async def _wait(self) -> None:
        """Until something changed; who waits for memory or a turn looks again by itself."""
        is_waiting = any(hop.wants_return or hop.queue for hop in self._sessions)
        timeout_s = ROOM_POLL_S if is_waiting else None
        if self._held_s is not None:
            timeout_s = min(ROOM_POLL_S, self._held_s)
        if timeout_s is None:
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _fill_gap(self, *, is_idle: bool) -> bool:
        """One step of other work if it is due: rows that come now wait for it, and no longer."""
        work = self._gap_work
        if work is None or not work.is_due(asyncio.get_running_loop().time(), is_idle=is_idle):
            return False
        async with self._lock:
            self._settle()
            await work.step()
        return True

    async def _iterate(self) -> bool:
        async with self._lock:
            self._settle()
            self._let_return()
            batch = self._next_batch()
            self._settle()
            if not batch:
                return False
            work = [_Work(hop, hop.next_calls(count), item) for hop, count, item in batch]
            calls = [call for one in work for call in one.calls]
            num_tokens = sum(call.count for call in calls)
            now = asyncio.get_running_loop().time
            self.running_tokens, self.running_since_s = num_tokens, now()
            try:
                outcomes = await self._run(calls)
            finally:
                self.running_tokens = 0
            duration_s = now() - self.running_since_s
            self.rows += num_tokens
            self._busy_s += duration_s
            self.pace.add(num_tokens, duration_s)
            if all(one.is_decode for one in work):
                longest = max(len(one.hop.plan.span) for one in work)
                self.pace.add_decode(num_tokens, duration_s, longest, now())
            self._account(work, now())
            self.iteration += 1
        done = iter(outcomes)
        for one in work:
            self._commit(one.hop, list(islice(done, len(one.calls))))
        self._sessions.bound_logs()
        return True

    def _account(self, work: Sequence[_Work], now_s: float) -> None:
        """Note who decoded, whose chunks ran, and how much of whom."""
        plans = [(one, one.hop.plan) for one in work]
        self._fairness.ran(
            [
                Ran(one.hop.sequence, plan.owner, plan.num_hops, one.is_decode)
                for one, plan in plans
            ],
            self.running_since_s,
            now_s,
            sum(call.count for one in work for call in one.calls),
        )
        for one, plan in plans:
            one.hop.is_rebuilding = one.hop.is_rebuilding and not one.is_decode
            num_bytes = sum(memoryview(call.payload).nbytes for call in one.calls)
            self._rates.took(plan.owner, num_bytes, now_s)
        self._rates.forget_paid(now_s)

    def _settle(self) -> None:
        for hop in self._sessions.settle():
            self._events.on_held_changed(hop)

    def _let_return(self) -> None:
        """Parked sessions come back where there is room, the oldest first."""
        now_s = asyncio.get_running_loop().time()
        waiting: list[HopSession] = []
        for hop in self._sessions.returning():
            if any(self._sessions.is_beside(hop, older) for older in waiting):
                continue  # the oldest goes first: younger ones don't slip past it
            length = hop.parked_length + RETURN_MARGIN_TOKENS
            length = min(length, self._sessions.length_max(hop))
            parked = self._sessions.make_room(hop, length, now_s)
            if parked is None and self._sessions.is_capped(hop, length):
                continue  # it waits for sessions of its own client or address
            if parked is None:
                waiting.append(hop)
                continue
            hop.is_parked = hop.wants_return = False
            hop.parked_length = 0
            hop.used_s = now_s
            for other in [hop, *parked]:
                self._events.on_held_changed(other)

    def _next_batch(self) -> list[tuple[HopSession, int, bool]]:
        """The sessions whose first entries run now, how many of each, and whether they decode."""
        now_s = asyncio.get_running_loop().time()
        by_key: dict[SessionKey, HopSession] = {}
        ready = []
        before, self._since = self._since, {}
        for hop in self._sessions:
            if not hop.queue or hop.is_parked:
                continue
            since = self._since[hop.sequence] = before.get(hop.sequence) or next(self._arrivals)
            is_ahead = hop.outbound.backlog_bytes > self._limits.run_ahead_bytes
            if is_ahead and not hop.plan.is_standby:  # which sends to nobody
                continue
            by_key[hop.key] = hop
            ready.append(self._waiting(hop, since))
        waiting = self._in_turn(ready, now_s)
        batch: dict[SessionKey, int] = {}
        left = waiting
        for _ in range(CHOICES_MAX):
            misfits: set[SessionKey] = set()
            for key in self._chosen(left, now_s) if left else ():
                hop = by_key[key]
                count = batch.get(key) or self._fitting(hop, batch, now_s)
                if count:
                    self._since.pop(hop.sequence, None)
                    hop.used_s = now_s
                    batch[key] = count
                else:
                    misfits.add(key)
            if not misfits:
                break
            # Whoever finds no room must not hold up those who need none: choose again.
            left = [item for item in left if item.key not in misfits]
        decoding = {item.key for item in waiting if item.is_decode}
        is_passed_over = len(decoding) < len(waiting) and decoding.issuperset(batch)
        self._passed_over = self._passed_over + 1 if is_passed_over else 0
        return [
            (by_key[key], count, key in decoding)
            for key, count in batch.items()
            if by_key[key].queue
        ]

    def _chosen(self, waiting: list[Waiting], now_s: float) -> list[SessionKey]:
        owners = {item.owner for item in waiting if item.is_decode}
        is_in_company = self._fairness.is_in_company(owners, now_s)
        return choose_batch(
            waiting,
            budget_tokens=self._limits.budget_tokens,
            rows_per_owner=self._limits.fair.rows_per_client if is_in_company else None,
            chunks_max=1 if is_in_company else None,
            is_chunk_due=self._passed_over >= PASSED_OVER_MAX,
        )

    def _waiting(self, hop: HopSession, since: int) -> Waiting:
        count = hop.next_count(self._calls_max)
        return Waiting(
            key=hop.key,
            owner=hop.plan.owner,
            num_tokens=sum(entry.count for entry in islice(hop.queue, count)),
            is_replay=hop.plan.is_standby or hop.queue[0].end <= hop.log.end or len(hop.queue) > 1,
            since=since,
            owner_turn=self._fairness.last_chunk_s(hop.plan.owner),
            seniority=hop.seniority if hop.is_rebuilding and not hop.plan.is_standby else None,
        )

    def _in_turn(self, ready: list[Waiting], now_s: float) -> list[Waiting]:
        """Those that may run now: chunks must leave time to the decode rows of others."""
        hops = list(self._sessions)
        self._fairness.keep_only({hop.sequence for hop in hops}, {hop.plan.owner for hop in hops})
        chunk_owners = {item.owner for item in ready if not item.is_decode}
        chunk_waits = self._fairness.chunk_waits_s(chunk_owners, now_s)
        rate_waits = {item.owner: self._rates.wait_s(item.owner, now_s) for item in ready}
        waits = [
            max(rate_waits[item.owner], 0.0 if item.is_decode else chunk_waits.get(item.owner, 0.0))
            for item in ready
        ]
        self._held_s = min((wait_s for wait_s in waits if wait_s), default=None)
        return [item for item, wait_s in zip(ready, waits, strict=True) if not wait_s]

    def _fitting(self, hop: HopSession, keep: Collection[SessionKey], now_s: float) -> int:
        """How many of the session's first entries find room: all that suit a run, one or none."""
        if hop.is_parked or not hop.queue:
            return 0  # just now, to make room for another of this batch
        count = hop.next_count(self._calls_max)
        for tried in (count, 1) if count > 1 else (1,):
            try:
                parked = self._sessions.make_room(hop, hop.queue[tried - 1].end, now_s, keep)
            except SessionTooLong as error:
                if tried > 1:
                    continue
                self._events.on_failed(hop, error)
                return 0
            if parked is not None:
                for victim in parked:
                    self._events.on_held_changed(victim)
                return tried
        return 0

    async def _run(self, calls: list[Call]) -> list[Outcome]:
        try:
            return await self._backend.run(calls)
        except Exception:
            logger.warning(
                "batch failed calls=%d; running them one by one", len(calls), exc_info=True
            )
        outcomes: list[Outcome] = []
        failed: dict[SequenceId, ShoalError] = {}
        for call in calls:
            outcome: Outcome = failed.get(call.sequence) or await self._run_alone(call)
            if isinstance(outcome, ShoalError):
                failed[call.sequence] = outcome
            outcomes.append(outcome)
        return outcomes

    async def _run_alone(self, call: Call) -> Outcome:
        try:
            length = self._backend.truncate(call.sequence, call.position)
            if length < call.position:
                return SessionLost("the backend lost rows in a failed batch")
            return (await self._backend.run([call]))[0]
        except Exception as error:
            logger.exception("call failed sequence=%d position=%d", call.sequence, call.position)
            return error if isinstance(error, ShoalError) else InternalError(repr(error))

    def _commit(self, hop: HopSession, outcomes: Sequence[Outcome]) -> None:
        if self._sessions.find(hop.key) is not hop:
            return  # closed meanwhile
        for outcome in outcomes:
            if isinstance(outcome, ShoalError):
                self._events.on_failed(hop, outcome)
                return
            hop.commit(outcome)
        limit_bytes = self._limits.log_bytes_per_session_max
        if hop.log.num_bytes > limit_bytes:
            hop.shorten_log(limit_bytes // 2)
        self._events.on_output(hop)
        self._events.on_worked_off(hop)
