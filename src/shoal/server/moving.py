"""How a running server goes to other blocks: load, switch, announce, clear out, drop.

The new blocks load while the old ones serve. Then new sessions get the new blocks, those that
run stay with the old ones until their owners have moved them, or until a deadline; what is left
then is closed as lost, and its owners bring it back elsewhere by replay. Where to go, and
whether, is decided in `shoal.plan` and `rebalancing`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError, SessionLost, ShoalError
from shoal.base.spans import Span
from shoal.server.server import Server
from shoal.server.switching import SwitchingBackend

logger = logging.getLogger(__name__)

LEAVE_S: Final = 60.0
"""Running sessions may stay with the old blocks for this long: their memory is held twice."""

LOOK_S: Final = 0.25
"""How often to look whether they have left."""

LoadBlocks = Callable[[Span], Awaitable[BlockBackend]]
"""Loads blocks beside those that are served; raises ShoalError if there is no room, or else."""

AnnounceBlocks = Callable[[BackendFacts], Awaitable[None]]
"""Tells the swarm what is served from now on."""


class SpanMover:
    """Moves one server to other blocks, one move at a time."""

    def __init__(
        self,
        server: Server,
        backend: SwitchingBackend,
        load: LoadBlocks,
        announce: AnnounceBlocks,
        *,
        leave_s: float = LEAVE_S,
        tidy: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`backend` is what the server was made with; `tidy` runs after the old one is gone."""
        self._server = server
        self._backend = backend
        self._load = load
        self._announce = announce
        self._leave_s = leave_s
        self._tidy = tidy

    async def move(self, span: Span) -> bool:
        """Serve `span` instead; returns when the old blocks are gone.

        False: it was refused, and nothing has changed; the log says why.

        Raises:
            ConfigError: the announcement is no good (as `Announcer.announce`).
        """
        old = self._backend.facts.span
        try:
            new = await self._load(span)
        except ShoalError as error:
            logger.warning("move refused from=%s to=%s reason=%s", old, span, error)
            return False
        except Exception:  # whatever failed, the old blocks serve on
            logger.exception("move failed from=%s to=%s", old, span)
            return False
        if not await self._switch(new):
            return False
        logger.info("blocks switched from=%s to=%s sessions_left=%d",
                    old, span, len(self._server.sessions.retired))  # fmt: skip
        await self._announce(self._backend.facts)
        await self._clear_out(old)
        return True

    async def _switch(self, new: BlockBackend) -> bool:
        """From now on new sessions get the new blocks; False: they can't."""
        is_switched = False
        try:
            async with self._server.engine.exclusive():
                self._backend.add(new)
                self._server.sessions.retire_all()
                self._server.training.moved()
                is_switched = True
        except ConfigError as error:
            logger.warning("move refused reason=%s", error)
        finally:
            if not is_switched:
                await new.aclose()
        return is_switched

    async def _clear_out(self, old: Span) -> None:
        """Wait for the sessions of the old blocks to leave; close the rest; free the memory."""
        sessions, loop = self._server.sessions, asyncio.get_running_loop()
        deadline_s = loop.time() + self._leave_s
        if sessions.retired:
            await self._server.leave(old, self._leave_s, only=sessions.retired)
        while True:  # those whose owners are away, and forks that came meanwhile
            if not sessions.retired or loop.time() >= deadline_s:
                break
            await asyncio.sleep(LOOK_S)
        async with self._server.engine.exclusive():
            for hop in sessions.retired:
                error = SessionLost(f"blocks {old} are not served here any more")
                self._server.on_failed(hop, error)
            sessions.end_retirement()
            await self._backend.drop_old()
        if self._tidy is not None:
            await self._tidy()
        logger.info("old blocks dropped blocks=%s", old)
