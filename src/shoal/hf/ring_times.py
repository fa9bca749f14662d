"""How fast a ring is: what its nodes measured, whole trips, and the head here.

Trips are measured with sessions of a few rows before the samples start; while they run, what
nodes say of their passes puts the times right (`RingPace.observe`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.hf.generation import RowScores, TokenHead
from shoal.plan.slot_trials import choose_measured
from shoal.plan.slots import RingTimes, Slots, moved_times, ring_times, slots_of
from shoal.plan.spec import DecodeTimes

if TYPE_CHECKING:
    from shoal.client.client import Client
    from shoal.plan.view import Stage

TRIP_ROWS_MAX: Final = 8
"""Rows of the larger of two trips: enough to see what a row more costs."""

TRIPS: Final = 4
TRIPS_BUDGET_S: Final = 3.0
"""No further trip is begun after this; each size is tried twice at least."""

HEAD_RUNS: Final = 3

SETTLE_TRIPS: Final = 2
TRIAL_TRIPS: Final = 6
TRIAL_S: Final = 0.4
"""A trial begins after so many trips of every sample, and lasts so many and so long at least."""

FACTOR_MIN: Final = 0.25
FACTOR_MAX: Final = 20.0
"""A pass so many times as long as was measured: beyond it something stood still."""


async def measure_trips(
    client: Client, head: TokenHead, encoding: str, rows_max: int
) -> tuple[tuple[PeerId, ...], tuple[int, ...], list[tuple[int, float]]]:
    """Peers and blocks of the ring's stages, and (rows, seconds once round) without the head.

    Raises:
        NoRouteError, PeerError, SessionError: the ring could not do it.
    """
    sizes = sorted({1, min(rows_max, TRIP_ROWS_MAX)})
    clock = asyncio.get_running_loop().time
    row, began_s = head.embed([0], encoding), clock()
    trips: list[tuple[int, float]] = []
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(await client.open_session(encoding))
            for _ in range(sizes[-1])
        ]
        for size in sizes:
            taken: list[float] = []
            while len(taken) < 2 or (len(taken) < TRIPS and clock() - began_s < TRIPS_BUDGET_S):
                started_s = clock()
                await asyncio.gather(*(session.step(row, 1) for session in sessions[:size]))
                taken.append(clock() - started_s)
            trips.append((size, min(taken)))
        chain = sessions[0].chain
    peers = tuple(stage.peer for stage in chain)
    return peers, tuple(len(stage.span) for stage in chain), trips


async def measure_head(
    batch: RowScores, head: TokenHead, encoding: str, rows_max: int
) -> DecodeTimes:
    """Seconds that the head takes for so many rows that come together."""
    row, clock = head.embed([0], encoding), asyncio.get_running_loop().time
    points = []
    for size in sorted({1, 2, 4, rows_max}):
        if size > rows_max:
            continue
        taken = []
        for _ in range(HEAD_RUNS):
            started_s = clock()
            await asyncio.gather(*(batch.logits(row, encoding) for _ in range(size)))
            taken.append(clock() - started_s)
        points.append((size, min(taken)))
    return DecodeTimes(points=tuple(points))


def curves_of(client: Client, peers: Sequence[PeerId]) -> list[tuple[tuple[int, float], ...]]:
    """What servers say of their decode times, (rows, seconds through one block); empty: nothing."""
    known = {server.peer: server for server in client.view().servers}
    curves: list[tuple[tuple[int, float], ...]] = []
    for peer in peers:
        server = known.get(peer)
        curve = () if server is None else server.decode_s_by_batch
        if not curve and server is not None and server.decode_s_per_block > 0:
            curve = ((1, server.decode_s_per_block),)
        curves.append(curve)
    return curves


class RingPace:
    """What is known of a ring's speed now."""

    def __init__(self, peers: Sequence[PeerId], spans: Sequence[int], times: RingTimes) -> None:
        self.peers = tuple(peers)
        """Servers of the stages, in order."""
        self.spans = tuple(spans)
        """Blocks of each."""
        self._measured = times
        self._factors = [1.0] * len(times.stages)

    @property
    def times(self) -> RingTimes:
        """As far as is known now."""
        return self._measured.scaled(self._factors)

    def slots(
        self,
        samples: int,
        fixed: int | None = None,
        measured: Mapping[int, float] = MappingProxyType({}),
    ) -> Slots:
        """How so many samples should go round; `fixed`: as a person wants it.

        `measured`: tokens per second that numbers of slots gave.
        """
        if fixed is not None:
            return slots_of(self.times, samples, min(fixed, samples))
        return choose_measured(self.times, samples, measured)

    def move(
        self,
        chain: Sequence[Stage],
        curves: Sequence[Sequence[tuple[int, float]]],
    ) -> None:
        """The chain is another one now."""
        spans = tuple(len(stage.span) for stage in chain)
        self._measured = moved_times(self._measured, self.spans, spans, curves)
        self._factors = [1.0] * len(self._measured.stages)
        self.peers, self.spans = tuple(stage.peer for stage in chain), spans

    def observe(self, passes: Mapping[PeerId, tuple[float, float]]) -> None:
        """Take what servers did of late: (rows per pass, seconds per pass), of decode rows only."""
        for index, peer in enumerate(self.peers):
            rows, seconds = passes.get(peer, (0.0, 0.0))
            expected_s = self._measured.stages[index].at(rows)
            if rows > 0 and seconds > 0 and expected_s > 0:
                factor = seconds / expected_s
                self._factors[index] = min(FACTOR_MAX, max(FACTOR_MIN, factor))


@dataclass(frozen=True, slots=True)
class Trial:
    """What goes round, for as long as nothing of it changes."""

    samples: int
    slots: int
    prompts: int
    """Counts prompts: none was computed meanwhile."""


class TrialClock:
    """Times tokens of samples that decode, one trial after the other. No I/O, no clock."""

    def __init__(self) -> None:
        self.measured: dict[int, dict[int, float]] = {}
        """Tokens per second, by samples and slots."""
        self._trial: Trial | None = None
        self._tokens = 0
        self._began_s = 0.0

    def forget(self) -> None:
        """The ring is another one now."""
        self.measured.clear()
        self._trial = None

    def came(self, at_s: float, trial: Trial | None) -> bool:
        """A token came while this was so (None: it can't be told); whether a trial is complete."""
        if trial is None or trial != self._trial:
            self._trial, self._tokens = trial, 0
            return False
        self._tokens += 1
        settle = SETTLE_TRIPS * trial.samples
        if self._tokens <= settle:
            self._began_s = at_s
            return False
        tokens, lasted_s = self._tokens - settle, at_s - self._began_s
        if tokens < TRIAL_TRIPS * trial.samples or lasted_s < TRIAL_S:
            return False
        self.measured.setdefault(trial.samples, {})[trial.slots] = tokens / lasted_s
        self._tokens, self._began_s = settle, at_s
        return True


async def measure_ring(
    client: Client, head: TokenHead, batch: RowScores, encoding: str, samples: int
) -> RingPace:
    """What the ring does with 1 row and with as many as there will be, at most.

    Raises:
        ConfigError: no samples.
        NoRouteError, PeerError, SessionError: the ring could not do it.
    """
    if samples < 1:
        raise ConfigError("a ring needs at least 1 sample")
    peers, spans, trips = await measure_trips(client, head, encoding, samples)
    curves = curves_of(client, peers)
    head_times = await measure_head(batch, head, encoding, samples)
    return RingPace(peers, spans, ring_times(spans, curves, trips, head_times))
