"""The end of a gateway: whoever still waits for an answer is told so."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from shoal.gateway.errors import ApiError

T = TypeVar("T")

STOPPED_RETRY_S: Final = 5.0
"""Whoever started another gateway by then answers."""


class Closing:
    """Ends the answers that are at work when the gateway stops."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    def end(self) -> None:
        """All answers end now. Idempotent."""
        self._over.set()

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the gateway ends before.

        Raises:
            ApiError: 503: it ended.
        """
        task, ending = asyncio.ensure_future(work), asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(
                    503, "this gateway is being stopped: ask again, here or at another one",
                    code="stopping", retry_after_s=STOPPED_RETRY_S,
                )  # fmt: skip
            return task.result()
        finally:
            for one in (task, ending):
                one.cancel()
            await asyncio.gather(task, ending, return_exceptions=True)
