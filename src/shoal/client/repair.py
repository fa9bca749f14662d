"""Keeping one session's chain whole: opening it, and repairing it when a part is lost.

The client alone decides. A repair is a new route with a higher epoch: living hops keep
their state, the hop before a gap streams its log to the replacement. If every server of
the chain falls silent at once and nobody else answers either, the client's own link is
to blame: nobody is banned, and it waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from shoal.base.errors import (
    AdapterBad,
    InternalError,
    NoRouteError,
    PeerBusy,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.client import tending
from shoal.client.aftermath import gone, judge_numerics
from shoal.client.routing import Followed, RouteFacts
from shoal.client.session import Recovery, SessionState, Trouble
from shoal.client.tending import TendConfig, Tender
from shoal.client.waiting import OnWaiting, Waiting, gave_up, waiting_for
from shoal.plan.moving import keep_valid, promote
from shoal.plan.repair import choose_repair, merge_neighbours, with_client_links
from shoal.plan.routing import Wanted, choose_chain, will_do
from shoal.plan.view import Stage, Standby

logger = logging.getLogger(__name__)

BACKOFF_S: Final = 0.1
"""Pause before the second attempt; doubles up to BACKOFF_S_MAX."""

BACKOFF_S_MAX: Final = 2.0

CALM_S: Final = 30.0
"""An idle session that was mended this long ago has got over it."""

ASK_ROUNDS_MAX: Final = 4
"""How often the best chain is chosen anew when its servers said that they are full."""

ASK_S: Final = 1.0
"""Who does not say within this how full it is is passed over where others will do."""

SILENT_S: Final = 10.0
"""How long it is passed over; whoever is gone is known to be by then."""

PROBES_MAX: Final = 4
"""Other servers asked whether they answer, before the client blames its own link."""


NOBODY: Final = Followed(held={}, ready={}, refused={})
"""A chain that could not be chosen."""


class Swarm(tending.Swarm, Protocol):
    """What a repair needs of the client."""

    patience_s: float
    on_waiting: OnWaiting | None

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return when the directory changed or the time is over."""

    async def answers(self, peer: PeerId) -> bool:
        """Whether the peer answers now, dialling it if need be."""

    def end(self, state: SessionState, error: ShoalError) -> None:
        """The session can't go on: forget it here and at its servers."""


class Supervisor:
    """Opens one session's chain and mends it until the session ends."""

    def __init__(
        self,
        swarm: Swarm,
        state: SessionState,
        facts: RouteFacts,
        wanted: Wanted,
        config: TendConfig | None = None,
        offered: Sequence[Stage] = (),
    ) -> None:
        """`offered`: a chain to open with, if it will do (`plan.routing.will_do`)."""
        self._offered = tuple(offered)
        self._swarm = swarm
        self._tender = Tender(swarm, state, facts, wanted, config or TendConfig())
        self._state = state
        self._facts = facts
        self._wanted = wanted
        self._waiting: Waiting | None = None
        """What the user was told last."""
        self._strikes: Counter[PeerId] = Counter()
        """How often peers failed or refused in the repair that runs."""
        self._held: dict[tuple[PeerId, int], int] = {}
        """The least that hops said to hold in it: what came later is replay."""
        self._adapter_bad_at: set[PeerId] = set()
        """Peers that said in it that the adapter can't be."""
        self._refusing: set[PeerId] = set()
        """Peers that answered in it, and would not."""

    async def run(self) -> None:
        """Mend whenever trouble is reported, tend in between; ends when the session has failed."""
        state = self._state
        state.needs_tending = self._tender.wants_standbys
        while True:
            await self._wait()
            if state.failure is not None:
                return
            try:
                if state.trouble:
                    await self.mend()
                    state.needs_tending = True
                else:
                    await self._tender.tend()
            except ShoalError as error:
                self._give_up(error)
            except Exception as error:
                logger.exception("repair broke session=%s", short(self._state.id))
                self._give_up(InternalError(repr(error)))

    async def _wait(self) -> None:
        """Until there is something to look at, or it is time to look whether there is."""
        state = self._state
        if state.trouble or state.failure is not None:
            return
        try:
            async with asyncio.timeout(0 if state.needs_tending else self._tender.period_s):
                await state.stirred.wait()
        except TimeoutError:
            pass
        state.stirred.clear()

    def _give_up(self, error: ShoalError) -> None:
        logger.warning("session failed session=%s reason=%s",
                       short(self._state.id), error)  # fmt: skip
        self._swarm.end(self._state, error)

    async def mend(self) -> None:
        """Open the chain, or repair it.

        Raises:
            NoRouteError, PeerBusy, PeerError: not possible within the client's patience.
        """
        self._state.is_mending = True
        try:
            await self._mend()
        finally:
            self._tell(None)
            self._state.is_mending = False
            self._state.mended_s = asyncio.get_running_loop().time()

    async def _mend(self) -> None:
        state, swarm = self._state, self._swarm
        loop = asyncio.get_running_loop()
        since_s = state.trouble.since_s if state.trouble else loop.time()
        deadline_s = await self._begin() + swarm.patience_s
        before = [stage for stage in state.chain if len(stage.span)]
        peers_before = state.peers
        position = state.received_length
        lost: set[PeerId] = set()
        self._strikes.clear()
        self._refusing.clear()
        self._adapter_bad_at.clear()
        self._held.clear()
        while True:
            state.check_open()
            found = await self._find_lost(state.take_trouble(), lost)
            self._strikes.update(found)
            lost |= found
            error: ShoalError
            chain: Sequence[Stage] = ()
            followed = NOBODY
            try:
                await self._ask_around(lost)
                chain, standbys = self._choose(lost)
                followed = await self._install(chain, standbys)
                if not followed.refused and not self._concerns_chain(state.trouble):
                    state.take_trouble()
                    break
                self._check_adapter(followed, chain)
                lost |= self._learn(followed)
                error = next(iter(followed.refused.values()), NoRouteError("servers keep failing"))
            except NoRouteError as failure:
                error = failure
            waiting = waiting_for(
                error, before, lost, followed.refused, chain,
                patience_s=swarm.patience_s, deadline_s=deadline_s,
            )  # fmt: skip
            self._tell(waiting)
            if loop.time() + state.backoff_s > deadline_s:
                raise gave_up(error, waiting, loop.time()) from error
            await self._back_off()
        after = [stage for stage in chain if len(stage.span)]
        state.distrusted.clear()
        swarm.dismiss(state, gone(peers_before | state.queued_at, state))
        state.queued_at.clear()
        judge_numerics(state, swarm.view(), before, after)
        if before and lost and before != after:
            self._record(since_s, position, before, after)

    def _concerns_chain(self, trouble: Trouble) -> bool:
        """Whether anything of it is about the chain that is followed now."""
        is_lost = bool(trouble.lost & self._state.servers)
        return bool(is_lost or trouble.bad or trouble.links or trouble.is_out_of_step)

    def _tell(self, waiting: Waiting | None) -> None:
        """Say what we wait for, and that it is over."""
        before, self._waiting = self._waiting, waiting
        if waiting is not None and (before is None or str(before) != str(waiting)):
            now_s = asyncio.get_running_loop().time()
            logger.info("session waits session=%s left_s=%.0f reason=%s",
                        short(self._state.id), waiting.deadline_s - now_s, waiting)  # fmt: skip
        if self._swarm.on_waiting is not None and (before, waiting) != (None, None):
            self._swarm.on_waiting(self._state.id, waiting)

    async def _begin(self) -> float:
        """When the repairs since the last row began; waits if there were some."""
        state = self._state
        now_s = asyncio.get_running_loop().time()
        since_s = state.stuck_since_s
        trouble = state.trouble
        if trouble.is_out_of_step and not (trouble.lost or trouble.bad or trouble.links):
            return now_s  # only asks what everybody has: slow servers are no failure
        if since_s is None or (not state.is_waiting and now_s - state.mended_s > CALM_S):
            state.stuck_since_s, state.backoff_s = now_s, 0.0
            return now_s
        if not state.is_waiting:
            await self._back_off()
            return now_s
        if now_s - since_s > self._swarm.patience_s:
            raise PeerTimeout(
                f"repairs for {now_s - since_s:.0f} s brought no row "
                f"behind position {state.received_length}"
                + (f"; last: {state.last_error}" if state.last_error else "")
            )
        await self._back_off()
        return since_s

    async def _back_off(self) -> None:
        """The second attempt comes at once, later ones after longer and longer pauses."""
        state = self._state
        if state.backoff_s:
            await self._swarm.wait_for_news(state.backoff_s)
        state.backoff_s = min(BACKOFF_S_MAX, max(BACKOFF_S, 2 * state.backoff_s))

    async def _find_lost(self, trouble: Trouble, known: set[PeerId]) -> set[PeerId]:
        """Who must be replaced; keeps the client's own link out of it."""
        swarm, servers = self._swarm, self._state.servers
        now_s = asyncio.get_running_loop().time()
        lost = set(trouble.lost)
        for sender, receiver in sorted(trouble.links):
            ends = [peer for peer in (sender, receiver) if peer != swarm.me]
            answers = await asyncio.gather(*(swarm.answers(peer) for peer in ends))
            dead = {peer for peer, is_alive in zip(ends, answers, strict=True) if not is_alive}
            lost |= dead
            if not dead:
                swarm.experience.pair_failed(sender, receiver, now_s)
        if servers and servers <= (lost | known):
            alive = await self._alive_among(servers)
            if not alive and not await self._anybody_else(servers):
                logger.warning("no server answers: our own link? session=%s",
                               short(self._state.id))  # fmt: skip
                return set()
            known -= alive - self._refusing
            lost -= alive
        lost |= trouble.bad
        self._state.distrusted |= trouble.bad
        for peer in lost:
            swarm.experience.failed(peer, now_s)
        return lost

    async def _alive_among(self, peers: Iterable[PeerId]) -> set[PeerId]:
        peers = sorted(peers)
        answers = await asyncio.gather(*(self._swarm.answers(peer) for peer in peers))
        return {peer for peer, is_alive in zip(peers, answers, strict=True) if is_alive}

    async def _anybody_else(self, servers: set[PeerId]) -> bool:
        others = [s.peer for s in self._swarm.view().servers if s.peer not in servers]
        others = self._swarm.rng.sample(others, min(PROBES_MAX, len(others)))
        return bool(await self._alive_among(others))

    async def _ask_around(self, lost: set[PeerId]) -> None:
        """Before a session opens: ask who would be chosen how full it is, until all are known.

        So the least price is that of WS-RR, over what the candidates say; who was never asked
        counts as free.
        """
        asked: set[PeerId] = set()
        for _ in range(ASK_ROUNDS_MAX):
            if self._state.chain or self._offered:
                return  # who offers a chain knows how full it is
            chain, _standbys = self._choose(lost)
            now_s = asyncio.get_running_loop().time()
            peers = {stage.peer for stage in chain if len(stage.span)} - asked
            peers = {p for p in peers if not self._swarm.experience.knows_load(p, now_s)}
            if not peers:
                return
            asked |= peers
            await asyncio.gather(*map(self._ask, sorted(peers)))

    async def _ask(self, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(ASK_S):
                await self._swarm.decode_s_per_block(peer)
        except (ShoalError, TimeoutError) as error:
            logger.info("does not say how full it is peer=%s reason=%r", short(peer), error)
            now_s = asyncio.get_running_loop().time()
            self._swarm.experience.busy(peer, now_s, SILENT_S)

    def _choose(self, lost: set[PeerId]) -> tuple[list[Stage], list[Standby]]:
        """The chain to go on with, standbys in place of the lost, and the standbys left."""
        state, swarm = self._state, self._swarm
        now_s = asyncio.get_running_loop().time()
        experience = swarm.experience.snapshot(now_s)
        experience = replace(experience, avoid=experience.avoid | lost, strikes=dict(self._strikes))
        stages = [stage for stage in state.chain if len(stage.span)]
        if state.standstills:  # two hops at one server may lack the room for both
            stages = list(merge_neighbours(stages, swarm.view()))
        if not stages:
            chosen, self._offered = self._offered, ()  # one try
            if not will_do(swarm.view(), state.span, chosen, experience, self._wanted):
                chosen = choose_chain(
                    swarm.view(), state.span, experience, swarm.rng, wanted=self._wanted
                )
        else:
            fit = [
                one.stage
                for one in state.standbys
                if one.stage.peer not in state.distrusted and one.stage.peer not in state.unfit
            ]
            stages = list(promote(stages, lost, fit))
            gaps = frozenset(i for i, stage in enumerate(stages) if stage.peer in lost)
            chosen = tuple(stages)
            if gaps:
                numerics = state.classes.get(stages[min(gaps)].peer, "")
                chosen = choose_repair(
                    swarm.view(), stages, gaps, experience, numerics, swarm.rng,
                    wanted=self._wanted,
                )  # fmt: skip
        left = [one for one in state.standbys if one.stage.peer not in lost]
        valid = keep_valid(chosen, [one.stage for one in left if one.stage not in chosen])
        standbys = [one for one in left if one.stage in valid]
        return with_client_links(chosen, experience, swarm.me), standbys

    async def _install(self, chain: Sequence[Stage], standbys: Sequence[Standby]) -> Followed:
        followed = await self._swarm.install(self._state, self._facts, chain, standbys)
        for hop, length in followed.ready.items():
            self._held[hop] = min(length, self._held.get(hop, length))
        if followed.refused and not self._state.length:
            # nobody holds anything yet: choose all hops anew rather than repair
            busy = {p for p, error in followed.refused.items() if isinstance(error, PeerBusy)}
            self._state.queued_at |= busy  # and keep our places in line
            self._swarm.dismiss(self._state, self._state.peers - busy)
            self._state.chain = ()
            self._state.standbys = ()
        return followed

    def _check_adapter(self, followed: Followed, chain: Sequence[Stage]) -> None:
        """Give up where servers can't use the session's adapter.

        Two are believed that no other one could, or one where nobody else has its blocks.

        Raises:
            AdapterBad: what is wrong with it.
        """
        for peer, error in followed.refused.items():
            if isinstance(error, AdapterBad):
                self._adapter_bad_at.add(peer)
                if len(self._adapter_bad_at) > 1 or self._is_alone(peer, chain):
                    raise error

    def _is_alone(self, peer: PeerId, chain: Sequence[Stage]) -> bool:
        """Whether nobody else has some of a server's blocks."""
        view = self._swarm.view()
        others = replace(view, servers=tuple(one for one in view.servers if one.peer != peer))
        experience = self._swarm.experience.snapshot(asyncio.get_running_loop().time())
        try:
            for stage in chain:
                if stage.peer == peer and len(stage.span):
                    choose_chain(
                        others, stage.span, experience, self._swarm.rng, wanted=self._wanted
                    )
        except NoRouteError:
            return True
        return False

    def _learn(self, followed: Followed) -> set[PeerId]:
        """Whom to avoid after a refusal, and for how long; returns who must be replaced."""
        now_s = asyncio.get_running_loop().time()
        for peer, error in followed.refused.items():
            logger.info("route refused peer=%s reason=%s", short(peer), error)
            if isinstance(error, PeerBusy):
                self._swarm.experience.busy(peer, now_s, error.retry_after_s or BACKOFF_S_MAX)
            elif not isinstance(error, PeerError):
                self._swarm.experience.failed(peer, now_s)
            if not isinstance(error, PeerUnreachable | PeerTimeout):
                self._refusing.add(peer)
        self._strikes.update(followed.refused.keys())
        return set(followed.refused)

    def _record(
        self,
        since_s: float,
        position: int,
        before: Sequence[Stage],
        after: Sequence[Stage],
    ) -> None:
        state = self._state
        fresh = [stage for stage in after if stage not in before]
        held = [self._held.get((stage.peer, stage.span.start), 0) for stage in fresh]
        recovery = Recovery(
            position=position,
            lost=tuple(stage.peer for stage in before if stage not in after),
            replacement=tuple(stage.peer for stage in fresh),
            replayed_tokens=max((max(0, position - length) for length in held), default=0),
            pause_s=asyncio.get_running_loop().time() - since_s,
        )
        logger.info(
            "session repaired session=%s epoch=%d position=%d replayed=%d pause_s=%.3f",
            short(state.id), state.epoch, position, recovery.replayed_tokens, recovery.pause_s,
        )  # fmt: skip
        state.finish_recovery()
        if state.is_waiting:
            state.pending_recovery = recovery
            state.recovering_since_s = since_s
        else:
            state.recoveries.append(recovery)
