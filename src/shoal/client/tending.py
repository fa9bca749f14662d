"""Looking after a chain that is whole: standbys beside it, and moves before they are forced.

Everything here is a route with a higher epoch, like a repair; but new hops get ready as
standbys first, so the session does not wait for them. Whatever goes wrong meanwhile is the
repair's, and what a standby holds by then is not lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from shoal.base.errors import PeerBusy, SessionError, ShoalError
from shoal.base.ids import PeerId, short
from shoal.client.aftermath import gone, judge_numerics
from shoal.client.experience import ExperienceBook
from shoal.client.routing import Followed, RouteFacts
from shoal.client.session import Move, SessionState, Trouble
from shoal.plan.moving import (
    can_be_fed,
    choose_departure,
    choose_migration,
    choose_standbys,
    keep_valid,
)
from shoal.plan.repair import with_client_links
from shoal.plan.routing import Wanted
from shoal.plan.view import Experience, Stage, Standby, SwarmView
from shoal.wire.messages import Routed

logger = logging.getLogger(__name__)

TEND_PERIOD_S: Final = 5.0
"""How often a session looks for standbys that it lacks, and for servers that drain."""

MIGRATE_PERIOD_S: Final = 30.0
"""How often it looks for a faster chain, and how long it keeps one at least."""

STANDBY_LAG_ROWS: Final = 16
"""A standby gets so many rows at a time: it runs them at one go, in one tile, for little more
than the price of one; a death costs at most that one run."""

CLOSE_ROWS: Final = 8
"""So many rows behind, a new hop is ready: it makes them up within a step or two."""

POLL_S: Final = 0.05
POLL_S_MAX: Final = 0.5

PREPARE_S_MAX: Final = 120.0
"""A hop that is not ready by then will not be: the move is given up."""

UNFIT_S: Final = 30.0
"""A peer that could not stand by is asked again after this; each further time doubles it."""

UNFIT_S_MAX: Final = 600.0

MIGRATE_ROWS_MIN: Final = 32
"""Shorter sessions are over sooner than a move pays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TendConfig:
    """What a client's sessions do beyond what they must."""

    standby: int = 0
    """Standbys for each hop."""
    is_moving: bool = True
    """Whether sessions leave servers that drain, and slow ones."""


class Swarm(Protocol):
    """What tending needs of the client."""

    me: PeerId
    experience: ExperienceBook
    rng: random.Random

    def view(self) -> SwarmView:
        """The servers of the model that are known now."""

    async def install(
        self,
        state: SessionState,
        facts: RouteFacts,
        chain: Sequence[Stage],
        standbys: Sequence[Standby] = (),
    ) -> Followed:
        """Follow `chain` with the next epoch and make it known."""

    async def held(self, state: SessionState, peer: PeerId) -> Routed:
        """How far the session has come at a peer. Raises ShoalError."""

    async def decode_s_per_block(self, peer: PeerId) -> float:
        """What a peer's decode iterations take now; 0: it has done none. Raises ShoalError."""

    def dismiss(self, state: SessionState, peers: Iterable[PeerId]) -> None:
        """Tell servers that are no longer used to forget the session."""


class Tender:
    """Looks after one session's chain."""

    def __init__(
        self,
        swarm: Swarm,
        state: SessionState,
        facts: RouteFacts,
        wanted: Wanted,
        config: TendConfig,
    ) -> None:
        self._swarm = swarm
        self._state = state
        self._facts = facts
        self._wanted = wanted
        self._config = config
        self._migrated_s = 0.0
        """Loop time before which no faster chain is looked for."""

    @property
    def wants_standbys(self) -> bool:
        """Whether hops are to have standbys."""
        return self._config.standby > 0

    @property
    def period_s(self) -> float | None:
        """How often to tend unasked; None: never."""
        return TEND_PERIOD_S if self._config.standby or self._config.is_moving else None

    async def tend(self) -> None:
        """Move if a server is to be left or another chain is faster; else see to standbys.

        Returns early when trouble is reported.
        """
        state = self._state
        state.needs_tending = False
        stages = _stages(state.chain)
        if not stages or state.failure is not None:
            return
        target = self._departure(stages)
        if target is not None:
            await self._move(stages, target, "leaving")
            return
        target = await self._migration(stages)
        if target is not None:
            await self._move(stages, target, "slow")
        elif self._config.standby or state.standbys:
            await self._stand_by(stages)

    def _departure(self, stages: Sequence[Stage]) -> tuple[Stage, ...] | None:
        """The chain to move to because servers leave."""
        state, swarm = self._state, self._swarm
        if not self._config.is_moving:
            return None
        now_s = asyncio.get_running_loop().time()
        view, experience = swarm.view(), self._experience(now_s)
        draining = {server.peer for server in view.servers if server.state == "draining"}
        leaving = [
            stage for stage in stages if stage.peer in draining or self._is_left(stage, now_s)
        ]
        if not leaving:
            return None
        numerics = state.classes.get(leaving[0].peer, "")
        return choose_departure(
            view, stages, leaving, experience, numerics, swarm.rng, wanted=self._wanted
        )

    async def _migration(self, stages: Sequence[Stage]) -> tuple[Stage, ...] | None:
        """The chain to move to because it is faster, by what servers say of their pace now."""
        state, swarm = self._state, self._swarm
        now_s = asyncio.get_running_loop().time()
        classes = {state.classes.get(stage.peer, "") for stage in stages}
        is_short = state.length < MIGRATE_ROWS_MIN
        if not self._config.is_moving or is_short or len(classes) > 1 or now_s < self._migrated_s:
            return None
        self._migrated_s = now_s + MIGRATE_PERIOD_S * (0.5 + swarm.rng.random())
        if not await self._unless_stirred(self._learn_pace(stages)):
            return None
        target = self._faster(stages, *classes, is_hopeful=True)
        if target is None:
            return None
        new = [stage for stage in target if stage not in stages]
        if not await self._unless_stirred(self._learn_pace(new)):
            return None  # who does not answer now would be no better hop
        asked = {stage.peer for stage in (*stages, *target)}
        target = self._faster(stages, *classes, is_hopeful=False)
        return target if target and asked.issuperset(one.peer for one in target) else None

    def _faster(
        self, stages: Sequence[Stage], numerics: str, *, is_hopeful: bool
    ) -> tuple[Stage, ...] | None:
        """A faster chain; `is_hopeful`: servers never asked are as near as the nearest."""
        view = self._swarm.view()
        experience = self._experience(asyncio.get_running_loop().time())
        if is_hopeful and experience.rtt_s:
            experience = replace(experience, hope_s=min(experience.rtt_s.values()))
        return choose_migration(
            view, stages, experience, numerics, self._swarm.rng, wanted=self._wanted
        )

    async def _learn_pace(self, stages: Sequence[Stage]) -> bool:
        """Ask servers, all at once, how long decode rows take now; whether all of them answered."""
        said = {server.peer: server.decode_s_per_block for server in self._swarm.view().servers}
        peers = sorted({stage.peer for stage in stages})
        return all(
            await asyncio.gather(*(self._ask_pace(peer, said.get(peer, 0.0)) for peer in peers))
        )

    async def _ask_pace(self, peer: PeerId, said_s: float) -> bool:
        swarm = self._swarm
        try:
            measured_s = await swarm.decode_s_per_block(peer)
        except ShoalError as error:
            logger.debug("pace unknown peer=%s reason=%s", short(peer), error)
            return False
        if measured_s and said_s:
            now_s = asyncio.get_running_loop().time()
            swarm.experience.slow(peer, measured_s / said_s, now_s)
        return True

    async def _move(
        self,
        stages: Sequence[Stage],
        target: tuple[Stage, ...],
        reason: Literal["leaving", "slow"],
    ) -> None:
        """Make before break: the new stages stand by until they are close, then take over."""
        state = self._state
        started_s = asyncio.get_running_loop().time()
        new = [stage for stage in target if stage not in stages]
        logger.info("moving session=%s reason=%s hops=%d", short(state.id), reason, len(new))
        others = [
            one
            for one in state.standbys
            if one.stage not in new and one.stage.peer not in state.unfit
        ]
        valid = keep_valid(stages, [*new, *(one.stage for one in others)])
        standbys = [Standby(stage=stage) for stage in valid if stage in new]
        standbys += [one for one in others if one.stage in valid]
        experience = self._swarm.experience.snapshot(started_s)
        if can_be_fed(target, new, experience):
            if not await self._install(state.chain, standbys):
                return
            if not await self._become_ready(new, self._time_left_s(stages, target)):
                return
        experience = self._swarm.experience.snapshot(asyncio.get_running_loop().time())
        chain = with_client_links(target, experience, self._swarm.me)
        left = [one for one in state.standbys if one.stage not in target]
        kept = keep_valid(target, [one.stage for one in left])
        judge_numerics(state, self._swarm.view(), stages, target)
        if not await self._install(chain, [one for one in left if one.stage in kept]):
            return
        for stage in stages:
            if stage not in target:
                state.leaving.pop(stage.peer, None)
        now_s = asyncio.get_running_loop().time()
        move = Move(
            position=state.received_length,
            left=tuple(stage.peer for stage in stages if stage not in target),
            entered=tuple(stage.peer for stage in new),
            reason=reason,
            prepared_s=now_s - started_s,
        )
        state.moves.append(move)
        self._migrated_s = now_s + MIGRATE_PERIOD_S
        logger.info("session moved session=%s epoch=%d position=%d prepared_s=%.3f",
                    short(state.id), state.epoch, move.position, move.prepared_s)  # fmt: skip

    def _time_left_s(self, stages: Sequence[Stage], target: Sequence[Stage]) -> float:
        """How long the new hops may get ready: the servers to be left will soon be gone.

        A tenth of the time that those gave is for the change itself.
        """
        now_s = asyncio.get_running_loop().time()
        left = {stage.peer for stage in stages if stage not in target}
        ends = [until for peer, (_, until) in self._state.leaving.items() if peer in left]
        return min((0.9 * (until_s - now_s) for until_s in ends), default=PREPARE_S_MAX)

    async def _become_ready(self, new: Sequence[Stage], within_s: float) -> bool:
        """Wait until all new stages are close; False when something else is more urgent.

        After `within_s` it is too late to wait: what the new stages hold by then is used by
        moving at once, since the rest is replayed to them either way.
        """
        state = self._state
        now_s = asyncio.get_running_loop().time()
        late_s, until_s = now_s + within_s, now_s + PREPARE_S_MAX
        pause_s = POLL_S
        while not await self._unless_stirred(self._are_close(new)):
            if asyncio.get_running_loop().time() > late_s:
                break
            if asyncio.get_running_loop().time() > until_s:
                logger.info("move given up session=%s", short(state.id))
                until_s = asyncio.get_running_loop().time() + UNFIT_S
                state.unfit.update((stage.peer, until_s) for stage in new)
                return False
            try:
                async with asyncio.timeout(pause_s):
                    await state.stirred.wait()
            except TimeoutError:
                pause_s = min(POLL_S_MAX, 2 * pause_s)
            if state.stirred.is_set():
                return False
        return not state.trouble and state.failure is None

    async def _unless_stirred(self, question: Coroutine[None, None, bool]) -> bool:
        """The answer, or False as soon as something else is to be looked at."""
        asking = asyncio.ensure_future(question)
        stirring = asyncio.ensure_future(self._state.stirred.wait())
        try:
            await asyncio.wait({asking, stirring}, return_when=asyncio.FIRST_COMPLETED)
            return asking.done() and asking.result()
        finally:
            for task in (asking, stirring):
                task.cancel()
            await asyncio.gather(asking, stirring, return_exceptions=True)

    async def _are_close(self, new: Sequence[Stage]) -> bool:
        state = self._state
        wanted = max(0, state.length - CLOSE_ROWS)
        for peer in sorted({stage.peer for stage in new}):
            try:
                answer = await self._swarm.held(state, peer)
            except ShoalError as error:
                lose_standby(self._swarm.experience, state, peer, error)
                return False
            ready = {held.start: held.ready for held in answer.held}
            for stage in new:
                if stage.peer == peer and ready.get(stage.span.start, -1) < wanted:
                    return False
        return True

    async def _stand_by(self, stages: Sequence[Stage]) -> None:
        """See to it that every hop has its standbys."""
        state, swarm = self._state, self._swarm
        now_s = asyncio.get_running_loop().time()
        experience = self._experience(now_s)
        leaving = {peer for peer, (_, until_s) in state.leaving.items() if until_s > now_s}
        experience = replace(experience, avoid=experience.avoid | leaving)
        present = [
            one.stage
            for one in state.standbys
            if one.stage.peer not in state.unfit and not self._is_left(one.stage, now_s)
        ]
        chosen = choose_standbys(
            swarm.view(), stages, present, experience, state.classes,
            swarm.rng, wanted=self._wanted, count=self._config.standby,
        )  # fmt: skip
        standbys = [Standby(stage=stage, lag_rows=STANDBY_LAG_ROWS) for stage in chosen]
        if tuple(standbys) != state.standbys:
            await self._install(state.chain, standbys)

    async def _install(self, chain: Sequence[Stage], standbys: Sequence[Standby]) -> bool:
        """Make a route of it; a hop that does not follow is trouble for the repair."""
        state, swarm = self._state, self._swarm
        before = state.peers
        state.is_mending = True
        try:
            followed = await swarm.install(state, self._facts, chain, standbys)
        finally:
            state.is_mending = False
        swarm.dismiss(state, gone(before, state))
        if not followed.refused:
            return state.failure is None
        logger.info("change refused session=%s peers=%d", short(state.id), len(followed.refused))
        lost = {p for p, error in followed.refused.items() if not isinstance(error, PeerBusy)}
        trouble = Trouble(lost=lost, is_out_of_step=True)
        state.report(trouble, asyncio.get_running_loop().time())
        return False

    def _experience(self, now_s: float) -> Experience:
        """What we learned of peers, those that can't stand by just now among the avoided."""
        unfit = self._state.unfit
        for peer in [peer for peer, until_s in unfit.items() if until_s <= now_s]:
            del unfit[peer]
        experience = self._swarm.experience.snapshot(now_s)
        return replace(experience, avoid=experience.avoid | set(unfit))

    def _is_left(self, stage: Stage, now_s: float) -> bool:
        """Whether the stage's server said that it would leave these blocks."""
        span, until_s = self._state.leaving.get(stage.peer, (None, 0.0))
        return span is not None and until_s > now_s and bool(stage.span.overlap(span))


def lose_standby(
    experience: ExperienceBook, state: SessionState, peer: PeerId, error: ShoalError
) -> None:
    """A peer can't stand by: because it is full or can't be fed, or because it is broken."""
    now_s = asyncio.get_running_loop().time()
    if state.unfit.get(peer, now_s) > now_s:
        return  # known already
    logger.info("standby lost session=%s peer=%s reason=%s", short(state.id), short(peer), error)
    times = state.unfit_times[peer] = state.unfit_times.get(peer, 0) + 1
    period_s = min(UNFIT_S_MAX, UNFIT_S * 2.0 ** (times - 1))
    if isinstance(error, PeerBusy):
        experience.busy(peer, now_s, error.retry_after_s or UNFIT_S)
    elif not isinstance(error, SessionError):
        experience.failed(peer, now_s)
    state.lose_standby(peer, now_s + period_s)


def _stages(chain: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in chain if len(stage.span))
