"""How long a peer that sends us something large may keep us waiting, all waits together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from shoal.base.errors import PeerTimeout

RATE_BYTES_PER_S_MIN: Final = 64 << 10
"""The slowest upload that is worth its place: half a megabit per second."""

_T = TypeVar("_T")


class Patience:
    """Runs out while we wait for a peer, and comes back with the bytes that it sends.

    A limit on each wait alone lets a peer that sends a byte at a time stay for ever. Only
    waits count, not what we do between them. Never more is left than at the start, so a fast
    beginning buys no long silence. One wait at a time.
    """

    def __init__(self, limit_s: float, rate_bytes_per_s: float = RATE_BYTES_PER_S_MIN) -> None:
        self._limit_s = limit_s
        self._rate = rate_bytes_per_s
        self._left_s = limit_s

    async def wait(self, what: Awaitable[_T], reason: str) -> _T:
        """What the peer does, in what is left.

        Raises:
            PeerTimeout: with this reason; nothing is left.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            async with asyncio.timeout(self._left_s):
                return await what
        except TimeoutError as error:
            raise PeerTimeout(reason) from error
        finally:
            self._left_s = max(0.0, self._left_s - (loop.time() - started_s))

    def earn(self, num_bytes: int) -> None:
        """The peer sent so many bytes of what we wait for."""
        self._left_s = min(self._limit_s, self._left_s + num_bytes / self._rate)

    def renew(self) -> None:
        """The peer is through with one thing; the next begins as this one did."""
        self._left_s = self._limit_s
