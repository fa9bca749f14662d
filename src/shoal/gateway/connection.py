"""One HTTP connection, held to times: uvicorn waits for ever for headers and for readers.

A stranger who opens connections and says nothing, or half a header, or reads nothing, would
otherwise keep every place.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S: Final = 20.0
"""The headers of a request must be here by then."""

STUCK_S: Final = 45.0
"""A reader that takes no byte for so long is cut off; answers give up on it sooner."""

TICK_S: Final = 5.0
"""Between two looks."""


class TimedConnection(H11Protocol):
    """uvicorn's, which ends what stands still."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection is there; its first request should be soon."""
        super().connection_made(transport)
        self._asking_since_s: float | None = self.loop.time()
        self._moved_s = self.loop.time()
        self._unsent_bytes = 0
        self._ticking: asyncio.TimerHandle | None = self.loop.call_later(TICK_S, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        if self._is_answering:
            self._asking_since_s = None
        elif self._asking_since_s is None:
            self._asking_since_s = self.loop.time()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _tick(self) -> None:
        now_s = self.loop.time()
        unsent_bytes = self.transport.get_write_buffer_size()
        if not unsent_bytes or unsent_bytes < self._unsent_bytes:
            self._moved_s = now_s
        self._unsent_bytes = unsent_bytes
        is_slow = self._asking_since_s is not None and now_s - self._asking_since_s > HEADERS_S
        if unsent_bytes and now_s - self._moved_s > STUCK_S:
            self.transport.abort()
        elif is_slow and not self._is_answering:
            self.transport.close()
        self._ticking = self.loop.call_later(TICK_S, self._tick)
