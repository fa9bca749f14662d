"""How a node of a ring takes blocks: beside those that it serves, or in their place.

With room for both it moves like any server (`SpanMover`). Without, it gives the present blocks
up first: its sessions are lost here and come back by replay, as after a crash. So a board that
can just hold its share can still be given another.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, Protocol

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError, SessionLost, ShoalError
from shoal.base.spans import Span
from shoal.server.idle_backend import IdleBackend
from shoal.server.moving import LoadBlocks, SpanMover
from shoal.server.server import Server
from shoal.server.switching import SwitchingBackend

logger = logging.getLogger(__name__)

LEAVE_S: Final = 10.0
"""Sessions may stay with old blocks for this long: all of a ring's clients are near."""


class Announcing(Protocol):
    """How a node tells the swarm."""

    async def loading(self, facts: BackendFacts) -> None:
        """These blocks will be served soon, and no others now."""

    async def serving(self, facts: BackendFacts) -> None:
        """These blocks are served from now on."""

    async def idle(self) -> None:
        """No blocks are served here."""


class RingBlocks:
    """Gives one server its blocks, takes them away, exchanges them. One call at a time."""

    def __init__(
        self,
        server: Server,
        backend: SwitchingBackend,
        load: LoadBlocks,
        announcing: Announcing,
        tidy: Callable[[], Awaitable[None]],
        *,
        leave_s: float = LEAVE_S,
    ) -> None:
        """`backend` is what the server was made with; `tidy` runs after blocks are gone."""
        self._server = server
        self._backend = backend
        self._load = load
        self._announcing = announcing
        self._tidy = tidy
        self._leave_s = leave_s

    @property
    def span(self) -> Span:
        """What is served; empty: nothing."""
        return self._backend.facts.span

    async def take(self, span: Span, *, is_beside: bool) -> None:
        """Serve `span`, or nothing if it is empty; returns when other blocks are gone.

        Raises:
            ShoalError: it can't be loaded; beside others, those are still served.
        """
        if span == self.span:
            return
        if is_beside and len(self.span) and len(span):
            await self._move(span)
            return
        if len(self.span):
            await self._give_up()
        if not len(span):
            await self._announcing.idle()
            return
        await self._announcing.loading(self._facts(span))
        try:
            new = await self._load(span)
        except BaseException:
            await self._announcing.idle()
            raise
        await self._replace(new)
        await self._announcing.serving(self._backend.facts)

    async def _move(self, span: Span) -> None:
        reasons: list[ShoalError] = []

        async def load(wanted: Span) -> BlockBackend:
            try:
                return await self._load(wanted)
            except ShoalError as error:
                reasons.append(error)
                raise

        mover = SpanMover(
            self._server, self._backend, load, self._announcing.serving,
            leave_s=self._leave_s, tidy=self._tidy,
        )  # fmt: skip
        if not await mover.move(span):
            raise (reasons or [ConfigError(f"blocks {span} can't be served beside {self.span}")])[0]

    async def _give_up(self) -> None:
        old = self.span
        await self._replace(IdleBackend(self._backend.facts))
        await self._tidy()
        logger.info("blocks given up blocks=%s", old)

    async def _replace(self, new: BlockBackend) -> None:
        """At once: whoever is still here is lost."""
        server, old = self._server, self.span
        is_added = False
        try:
            async with server.engine.exclusive():
                self._backend.add(new)
                is_added = True
                server.sessions.retire_all()
                server.training.moved()
                for hop in server.sessions.retired:
                    server.on_failed(hop, SessionLost(f"blocks {old} are not served here any more"))
                server.sessions.end_retirement()
                await self._backend.drop_old()
        finally:
            if not is_added:
                await new.aclose()

    def _facts(self, span: Span) -> BackendFacts:
        return replace(self._backend.facts, span=span)
