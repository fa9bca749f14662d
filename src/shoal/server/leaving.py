"""Leaving blocks in good order: owners are asked to move their sessions, and waited for.

A session moves by a standby that its owner sets up elsewhere, so nobody is interrupted. Who
does not move in time is lost here and repaired by replay, as after a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from shoal.base.errors import PeerBusy
from shoal.base.spans import Span
from shoal.server.session import HopSession
from shoal.wire.messages import Leaving

ELSEWHERE_S: Final = 60.0
"""When to ask a draining server again: it will be gone."""


class Farewells:
    """Sessions that were asked to go, and whether new ones are taken."""

    def __init__(self) -> None:
        self.is_draining = False
        """Whether nothing new is taken any more."""
        self.leaving = Leaving(0, 1, 0.0)
        """What owners are told who come while it drains."""
        self._asked: list[tuple[set[HopSession], asyncio.Event]] = []

    def drain(self, span: Span, within_s: float) -> None:
        """Take nothing new from now on."""
        self.is_draining = True
        self.leaving = Leaving(span.start, span.end, within_s)

    async def wait(self, hops: Iterable[HopSession], within_s: float) -> bool:
        """Return when all of them have gone (True) or the time is over."""
        left, are_gone = set(hops), asyncio.Event()
        if not left:
            return True
        asked = (left, are_gone)
        self._asked.append(asked)
        try:
            async with asyncio.timeout(within_s):
                await are_gone.wait()
        except TimeoutError:
            return False
        finally:
            self._asked.remove(asked)
        return True

    def went(self, hop: HopSession) -> None:
        """A session is no longer here."""
        for left, are_gone in self._asked:
            left.discard(hop)
            if not left:
                are_gone.set()

    def check_taking(self) -> None:
        """Raise PeerBusy when nothing new is taken."""
        if self.is_draining:
            raise PeerBusy("this server is leaving the swarm", retry_after_s=ELSEWHERE_S)
