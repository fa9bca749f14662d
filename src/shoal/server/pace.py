"""Holding something to a rate: whoever takes bytes waits for its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pace:
    """Sends out turns at a rate: whoever takes `num_bytes` waits until its turn begins.

    The line is one moment in time behind which the next turn begins, so callers are served
    in the order in which they ask.
    """

    def __init__(self, rate: Callable[[], float]) -> None:
        """`rate` is in bytes per second now."""
        self._rate = rate
        self._free_s = 0.0

    async def take(self, num_bytes: int) -> None:
        """Wait for our turn. Cancelling gives nothing back: it is one piece at most."""
        now_s = asyncio.get_running_loop().time()
        start_s = max(self._free_s, now_s)
        self._free_s = start_s + num_bytes / self._rate()
        await asyncio.sleep(start_s - now_s)
