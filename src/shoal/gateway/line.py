"""Who answers next: a bounded line before a bounded number of places.

Callers take turns, so that one with a hundred requests delays another's by one at most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shoal.gateway.errors import ApiError
from shoal.gateway.keys import Caller


@dataclass(frozen=True, slots=True, kw_only=True)
class LineConfig:
    """How many at a time."""

    places: int = 32
    """Sessions at work: each is a row in the servers' passes, and takes cache."""
    waiting_max: int = 128
    wait_s: float = 60.0
    """Who waits longer is sent away: people have left by then."""


@dataclass(eq=False, slots=True)
class _Waiter:
    caller: Caller
    places: int
    turn: asyncio.Future[None]


class Line:
    """Places, and who waits for them. One event loop."""

    def __init__(self, config: LineConfig) -> None:
        self._config = config
        self._used: dict[str, int] = {}
        self._waiting: dict[str, deque[_Waiter]] = {}

    @property
    def num_running(self) -> int:
        """Places in use."""
        return sum(self._used.values())

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, caller: Caller, places: int = 1) -> AsyncIterator[None]:
        """Wait for so many places and hold them.

        Raises:
            ApiError: 429: the caller has too many already. 503: the line is full, or it
                took too long. 400: more than there are.
        """
        await self._enter(caller, places)
        try:
            yield
        finally:
            self._leave(caller, places)

    async def _enter(self, caller: Caller, places: int) -> None:
        self._check(caller, places)
        if not self._waiting and self._has_room(places):
            self._take(caller, places)
            return
        waiter = _Waiter(caller, places, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller.name, deque()).append(waiter)
        try:
            async with asyncio.timeout(self._config.wait_s):
                await waiter.turn
        except TimeoutError:
            self._give_up(waiter)
            raise ApiError(
                503, f"no place became free within {self._config.wait_s:g} s: try again later",
                code="overloaded", retry_after_s=self._config.wait_s,
            ) from None  # fmt: skip
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _check(self, caller: Caller, places: int) -> None:
        if places > self._config.places:
            raise ApiError(
                400, f"{places} answers at once; at most {self._config.places} run here", param="n"
            )
        mine = self._used.get(caller.name, 0) + sum(
            waiter.places for waiter in self._waiting.get(caller.name, ())
        )
        if caller.at_once is not None and mine + places > caller.at_once:
            raise ApiError(
                429, f"your key may have {caller.at_once} answers at once: wait for one to end",
                code="rate_limit_exceeded", retry_after_s=1.0,
            )  # fmt: skip
        if self.num_waiting >= self._config.waiting_max:
            raise ApiError(
                503, f"{self.num_waiting} requests wait already: try again later",
                code="overloaded", retry_after_s=self._config.wait_s / 4,
            )  # fmt: skip

    def _has_room(self, places: int) -> bool:
        return self.num_running + places <= self._config.places

    def _take(self, caller: Caller, places: int) -> None:
        self._used[caller.name] = self._used.get(caller.name, 0) + places

    def _leave(self, caller: Caller, places: int) -> None:
        self._used[caller.name] -= places
        if not self._used[caller.name]:
            del self._used[caller.name]
        self._call_next()

    def _give_up(self, waiter: _Waiter) -> None:
        """Out of the line, or out of the place that came at the same moment."""
        if waiter.turn.done() and not waiter.turn.cancelled():
            self._leave(waiter.caller, waiter.places)
            return
        name = waiter.caller.name
        mine = self._waiting.get(name, deque())
        if waiter in mine:
            mine.remove(waiter)
            if not mine:
                del self._waiting[name]
            self._call_next()

    def _call_next(self) -> None:
        while self._waiting:
            name = next(iter(self._waiting))
            mine = self._waiting[name]
            if mine[0].turn.done():  # given up, and its task did not run since
                self._drop_first(name, mine)
                continue
            if not self._has_room(mine[0].places):
                return  # the next one in turn waits until there is room, or it never would be
            waiter = mine[0]
            self._drop_first(name, mine)
            self._take(waiter.caller, waiter.places)
            waiter.turn.set_result(None)

    def _drop_first(self, name: str, mine: deque[_Waiter]) -> None:
        mine.popleft()
        del self._waiting[name]
        if mine:  # behind the other callers
            self._waiting[name] = mine
