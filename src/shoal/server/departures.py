"""Clients that went away: what they leave behind is freed after a grace period.

A client is there while its control stream stands. Whether it said good-bye, was killed or
lost power makes no difference but in how soon the end of that stream is noticed
(`shoal.server.control`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.base.ids import PeerId
from shoal.net.tasks import TaskSet


class Departures:
    """Waits for clients to come back, and frees what those left behind that don't."""

    def __init__(
        self,
        grace_s: float,
        is_here: Callable[[PeerId], bool],
        free: Callable[[PeerId], None],
        tasks: TaskSet,
    ) -> None:
        self._grace_s = grace_s
        self._is_here = is_here
        self._free = free
        self._tasks = tasks
        self._left: dict[PeerId, int] = {}
        """How often each client's control stream ended, until it was freed or is back."""

    def left(self, client: PeerId) -> None:
        """Its control stream ended."""
        if not self._tasks.is_closed:
            self._left[client] = self._left.get(client, 0) + 1
            self._tasks.spawn(self._free_later(client), "departure")

    async def _free_later(self, client: PeerId) -> None:
        times = self._left[client]
        await asyncio.sleep(self._grace_s)
        if self._left.get(client) != times:
            return  # came back and left again: the later grace period counts
        del self._left[client]
        if not self._is_here(client):
            self._free(client)
