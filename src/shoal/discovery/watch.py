"""Waiting for a record store to change, on the running loop's clock."""

from __future__ import annotations

import asyncio
import math

from shoal.discovery.directory import Snapshot
from shoal.discovery.store import RecordStore


class Watch:
    """The half of a Directory that every implementation shares: looking and waiting."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._news = asyncio.Event()
        store.on_change(self._wake)

    def snapshot(self) -> Snapshot:
        """What is valid now."""
        self._store.expire(asyncio.get_running_loop().time())
        return self._store.snapshot()

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one. Safe to cancel."""
        while (snapshot := self.snapshot()).version == version:
            expiry_s = self._store.next_expiry_s
            try:
                async with asyncio.timeout_at(expiry_s if math.isfinite(expiry_s) else None):
                    await self._news.wait()
            except TimeoutError:
                continue  # a record expired: look again
        return snapshot

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
