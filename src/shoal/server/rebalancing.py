"""The loop in which a server looks whether it would do more good at other blocks.

All decisions are pure (`shoal.plan.live`, `shoal.plan.rebalance`); here are the waiting and
the order: look, choose, say so with a ticket, wait, look again, go.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.live import Burden, LivePolicy, choose_move, swarm_of
from shoal.plan.rebalance import WAIT_S, may_leave, next_ticket
from shoal.plan.view import Intent, SwarmView

logger = logging.getLogger(__name__)

PERIOD_S: Final = 120.0
"""Between two looks, on average: Petals' default."""

JITTER: Final = 0.5
"""Each pause is up to this share shorter or longer, so that servers don't look at once."""

HOLE_JITTER_S: Final = 5.0
"""A block that nobody serves is looked after at once, but not by all at the same moment."""

REST_PERIODS: Final = 3.0
"""Who has moved looks again only after so many periods."""


class Surroundings(Protocol):
    """What the loop sees and does."""

    def look(self) -> SwarmView:
        """All servers that can be trusted to be there (`rebalance.trusted`), ourselves too."""

    async def hole(self) -> None:
        """Return when some block is served by nobody, and nobody loads it."""

    def burden(self) -> Burden:
        """What a move would cost the sessions that run here."""

    async def rtt_s(self) -> float:
        """Of a typical hop."""

    async def say(self, intent: Intent | None) -> None:
        """Tell the swarm what we want; None: to stay."""

    async def move(self, span: Span) -> bool:
        """Go there, and tell the swarm when we serve there; False: it was not possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceTimes:
    """When to look and how long to wait."""

    period_s: float = PERIOD_S
    wait_s: float = WAIT_S


def _at_once(work: Callable[[], Span | None]) -> Awaitable[Span | None]:
    done: asyncio.Future[Span | None] = asyncio.get_running_loop().create_future()
    done.set_result(work())
    return done


Think = Callable[[Callable[[], Span | None]], Awaitable[Span | None]]
"""Runs a decision, which may take a tenth of a second in large swarms: `asyncio.to_thread`."""


class Rebalancer:
    """Keeps one server where it does most good."""

    def __init__(
        self,
        policy: LivePolicy,
        me: PeerId,
        surroundings: Surroundings,
        rng: random.Random,
        times: RebalanceTimes | None = None,
        think: Think = _at_once,
    ) -> None:
        self.moves = 0
        """Made so far."""
        self._policy = policy
        self._me = me
        self._around = surroundings
        self._rng = rng
        self._times = times or RebalanceTimes()
        self._think = think

    async def run(self) -> None:
        """Look again and again, until cancelled.

        Raises:
            ConfigError: nobody would accept our record (as `Announcer.announce`).
        """
        rest, is_patient = 1.0, False
        while True:
            pause = self._rng.uniform(1 - JITTER, 1 + JITTER)
            is_urgent = await self._wait(pause * rest * self._times.period_s, is_patient)
            has_moved = await self.check()
            rest = REST_PERIODS if has_moved else 1.0
            is_patient = is_urgent and not has_moved  # it is for others to fill, or for nobody

    async def _wait(self, pause_s: float, is_patient: bool) -> bool:
        """Until it is time to look; whether a hole called us, which the patient don't hear."""
        if is_patient:
            await asyncio.sleep(pause_s)
            return False
        try:
            async with asyncio.timeout(pause_s):
                await self._around.hole()
                await asyncio.sleep(self._rng.uniform(0, HOLE_JITTER_S))
        except TimeoutError:
            return False
        return True

    async def check(self) -> bool:
        """Look once; whether we moved."""
        view = self._around.look()
        if all(one.peer != self._me for one in view.servers):
            return False  # our own record ran out while this machine slept; it is renewed
        ticket = next_ticket(view)
        target = await self._choose(view, ticket)
        if target is None or not may_leave(view, self._me, target, ticket):
            return False
        intent = Intent(ticket=ticket, span=target)
        logger.info("wants to move to=%s ticket=%d", target, ticket)
        await self._around.say(intent)
        await asyncio.sleep(self._times.wait_s)
        has_moved = False
        if await self._still_good(intent):
            await self._around.say(replace(intent, is_going=True))
            has_moved = await self._around.move(target)
        if not has_moved:
            await self._around.say(None)
        self.moves += has_moved
        return has_moved

    async def _still_good(self, intent: Intent) -> bool:
        """Whether the move is still the best one, and allowed, now that others know of it."""
        view = self._around.look()
        if all(one.peer != self._me for one in view.servers):
            return False
        if not may_leave(view, self._me, intent.span, intent.ticket):
            logger.info("stays: its blocks would not be covered to=%s", intent.span)
            return False
        if await self._choose(view, intent.ticket) != intent.span:
            logger.info("stays: the move does not pay any more to=%s", intent.span)
            return False
        return True

    async def _choose(self, view: SwarmView, ticket: int) -> Span | None:
        rtt_s = await self._around.rtt_s()
        burden, rng = self._around.burden(), random.Random(self._rng.random())
        swarm = swarm_of(_at_home(view, self._me), rtt_s=rtt_s, before=(ticket, self._me))
        mine = swarm.index(self._me)
        return await self._think(lambda: choose_move(self._policy, swarm, mine, rng, burden))


def _at_home(view: SwarmView, me: PeerId) -> SwarmView:
    """The view with ourselves where we are, whatever we want."""
    servers = (replace(one, intent=None) if one.peer == me else one for one in view.servers)
    return replace(view, servers=tuple(servers))
