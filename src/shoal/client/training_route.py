"""Lanes of a training step, and what is done when a server of one fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from shoal.base.errors import (
    AdapterBad,
    BadInput,
    ConfigError,
    MessageTooLarge,
    NoRouteError,
    PeerBusy,
    PeerRefused,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.spans import Span
from shoal.plan.repair import choose_repair
from shoal.plan.routing import Wanted, choose_chain
from shoal.plan.view import Experience, Stage

if TYPE_CHECKING:
    from shoal.client.training_host import TrainingHost

logger = logging.getLogger(__name__)

T = TypeVar("T")

TERMINAL: Final = (BadInput, AdapterBad, ConfigError, MessageTooLarge)
"""Failures that no other server would change, if they are what a server says they are."""

PAUSE_S: Final = 0.25
"""Before the same server is tried again; doubled each time."""

PAUSE_S_MAX: Final = 5.0

REFUSED_S: Final = 600.0
"""How long a server that does not train is avoided."""


TOO_LARGE_FIX: Final = (
    "cut batches finer (micro_tokens of TrainConfig), or sequences shorter (shoal finetune "
    "--max-length)"
)
"""What helps whoever gets MessageTooLarge: servers know no options of ours."""

PASS_ROWS: Final = 32
"""What a pass counts for, in rows of an answer, when trust comes back: several, as it is one."""

REFUSALS_MAX: Final = 3
"""Refusals of one server after which it is clear that nobody else has its blocks."""


class Lane:
    """A chain that micro-batches take, mended as its servers fail."""

    def __init__(self, host: TrainingHost, stages: tuple[Stage, ...], wanted: Wanted) -> None:
        self.stages = stages
        self.wanted = wanted
        self._host = host

    def has(self, border: int, end: int) -> bool:
        """Whether a server takes over at block `border`, and goes no further than `end`."""
        return any(stage.span.start == border and stage.span.end <= end for stage in self.stages)

    def at(self, border: int) -> Stage:
        """The server that takes over at block `border`."""
        return next(stage for stage in self.stages if stage.span.start == border)

    def mend(self, lost: Stage, experience: Experience) -> None:
        """Replace a server; another micro-batch may have done so already.

        Raises:
            NoRouteError: nobody else has its blocks.
        """
        if lost not in self.stages:
            return
        view = self._host.view()
        numerics = next((one.numerics for one in view.servers if one.peer == lost.peer), "")
        self.stages = choose_repair(
            view,
            self.stages,
            frozenset({self.stages.index(lost)}),
            experience,
            numerics,
            self._host.rng,
            wanted=self.wanted,
            flow="hub",
        )


class Trouble:
    """What went wrong on one micro-batch's way, and how much of that is borne."""

    def __init__(self, host: TrainingHost) -> None:
        self._host = host
        self._since_s: float | None = None
        self._strikes: dict[PeerId, int] = {}
        self._doubted: dict[type[ShoalError], PeerId] = {}
        """Who said first that nobody would do better."""
        self._retry_s: dict[PeerId, float] = {}
        """How long to wait before a peer is asked again."""

    def experience(self) -> Experience:
        """What is known of servers, failures on this way included."""
        now_s = asyncio.get_running_loop().time()
        return replace(self._host.experience.snapshot(now_s), strikes=dict(self._strikes))

    async def until_found(self, choose: Callable[[], T]) -> T:
        """What `choose` gives, as soon as servers are there for it.

        Raises:
            NoRouteError: they don't come within the client's patience.
        """
        while True:
            try:
                return choose()
            except NoRouteError as error:
                self._bear(error)
                await self._host.wait_for_news(1.0)

    async def lane_from(self, lane: Lane, border: int, end: int) -> Lane:
        """`lane` if a server of it takes over at `border`, else one of one's own.

        Raises:
            NoRouteError: as `until_found`.
        """
        if not lane.has(border, end):
            host = self._host

            def choose() -> Lane:
                chain = choose_chain(
                    host.view(), Span(border, end), self.experience(), host.rng,
                    wanted=lane.wanted, flow="hub",
                )  # fmt: skip
                return Lane(host, chain, lane.wanted)

            lane = await self.until_found(choose)
        wait_s = self._retry_s.get(lane.at(border).peer, 0.0)
        if wait_s:
            await asyncio.sleep(wait_s)
        return lane

    async def meet(self, lane: Lane, stage: Stage, error: ShoalError) -> None:
        """A server failed: think of it accordingly, and mend the lane.

        Raises:
            ShoalError: the failure itself, where nobody else would do better or patience ends.
                That no other server would do better is believed of two, or where there is no other.
        """
        if isinstance(error, TERMINAL) and self._is_believed(lane, stage, error):
            raise _with_fix(error)
        peer, now_s = stage.peer, asyncio.get_running_loop().time()
        logger.info("training failed peer=%s span=%s reason=%s: %s",
                    short(peer), stage.span, type(error).__name__, error)  # fmt: skip
        count = self._strikes[peer] = self._strikes.get(peer, 0) + 1
        wait_s = min(PAUSE_S_MAX, PAUSE_S * 2.0 ** (count - 1))
        book = self._host.experience
        if isinstance(error, PeerBusy):
            wait_s = max(wait_s, min(error.retry_after_s or 0.0, PAUSE_S_MAX))
            book.busy(peer, now_s, error.retry_after_s or wait_s)
        elif isinstance(error, PeerRefused):
            book.busy(peer, now_s, REFUSED_S)
            if count >= REFUSALS_MAX:
                raise error  # there is nobody else
        elif isinstance(error, SessionLost):
            book.busy(peer, now_s, wait_s)  # it went to other blocks: its record will tell
        else:
            book.failed(peer, now_s)
        self._retry_s[peer] = wait_s
        self._bear(error)

        def mend() -> None:
            lane.mend(stage, self.experience())

        await self.until_found(mend)

    def _is_believed(self, lane: Lane, stage: Stage, error: ShoalError) -> bool:
        """Whether a server's word that nobody would do better ends the matter."""
        first = self._doubted.setdefault(type(error), stage.peer)
        if first != stage.peer:
            return True
        view = self._host.view()
        others = tuple(one for one in view.servers if one.peer != stage.peer)
        try:
            choose_chain(
                replace(view, servers=others), stage.span, self.experience(), self._host.rng,
                wanted=lane.wanted,
            )  # fmt: skip
        except NoRouteError:
            return True
        return False

    def passed(self, stage: Stage) -> None:
        """A server did its part."""
        if self._host.experience.has_failures:
            now_s = asyncio.get_running_loop().time()
            self._host.experience.served(stage.peer, now_s, PASS_ROWS)
        if self._strikes:
            self._strikes.clear()
            self._retry_s.clear()
            self._since_s = None

    def _bear(self, error: ShoalError) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s > self._host.config.patience_s:
            raise error


def _with_fix(error: ShoalError) -> ShoalError:
    """The same, with what the user can do about it."""
    if not isinstance(error, MessageTooLarge) or TOO_LARGE_FIX in error.detail:
        return error
    return MessageTooLarge(f"{error.detail}; {TOO_LARGE_FIX}")
