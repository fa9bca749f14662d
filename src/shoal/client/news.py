"""What a session that found no chain waits for: the directory changes, or a server calls."""

from __future__ import annotations

import asyncio

from shoal.discovery.directory import Directory


class News:
    """Wakes everybody who waits."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._called = asyncio.Event()

    def call(self) -> None:
        """A server has room."""
        self._called.set()
        self._called.clear()

    async def wait(self, timeout_s: float) -> None:
        """Return when there is news, or the time is over."""
        changed = self._directory.changed(self._directory.snapshot().version)
        waiting = [asyncio.ensure_future(changed), asyncio.ensure_future(self._called.wait())]
        try:
            done, _ = await asyncio.wait(
                waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()  # a directory that failed must not look like news
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
