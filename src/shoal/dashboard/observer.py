"""Looks at a swarm again and again, quicker while somebody watches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from shoal.base.errors import ShoalError
from shoal.dashboard.events import Event, Model, compare

logger = logging.getLogger(__name__)

EVENTS_MAX: Final = 200
"""Kept; a page shows fewer."""

Look = Callable[[], Awaitable[Sequence[Model]]]
"""Models with their servers, as `shoal status --json` prints them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverConfig:
    """How often to look."""

    watched_s: float = 2.0
    """Between two looks while somebody watches: each is a few messages per server."""
    alone_s: float = 20.0
    """While nobody does: for the list of what happened."""
    patience_s: float = 15.0
    """Who did not ask for so long watches no more."""


class Observer:
    """What is known of a swarm, and what happened lately. Use `observing`."""

    def __init__(
        self,
        look: Look,
        wall_clock: Callable[[], float],
        config: ObserverConfig | None = None,
    ) -> None:
        self._look = look
        self._wall_clock = wall_clock
        self._config = config or ObserverConfig()
        self._clock = asyncio.get_running_loop().time
        self._models: Sequence[Model] | None = None
        self._rates: dict[str, float] = {}
        self._at_s = 0.0
        self._looked_s = 0.0
        self._asked_s: float | None = None
        self._asked = asyncio.Event()
        self._changed = asyncio.Condition()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)

    def note(self, event: Event) -> None:
        """Something that no look can see."""
        self._events.appendleft(
            {
                "at_s": round(self._wall_clock(), 3),
                "kind": event.kind,
                "model": event.model,
                "peer": event.peer,
                "text": event.text,
            }
        )

    async def state(self) -> dict[str, Any]:
        """What the page shows; waits for the first look, and counts as watching."""
        self._asked_s = self._clock()
        self._asked.set()
        async with self._changed:
            await self._changed.wait_for(lambda: self._models is not None)
        return {
            "at_s": round(self._at_s, 3),
            "interval_s": self._config.watched_s,
            "models": [self._with_rates(model) for model in self._models or ()],
            "events": list(self._events),
        }

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except ShoalError as error:
                logger.warning("the swarm could not be looked at: %s", error.detail)
            await self._pause()

    async def look(self) -> None:
        """Look once.

        Raises:
            ShoalError: as the look that was handed in.
        """
        models = await self._look()
        now_s = self._clock()
        if self._models is not None:
            for event in compare(self._models, models):
                self.note(event)
            self._rates = _rates(self._models, models, now_s - self._looked_s)
        async with self._changed:
            self._models, self._at_s, self._looked_s = models, self._wall_clock(), now_s
            self._changed.notify_all()

    async def _pause(self) -> None:
        """Until the next look: less when somebody asks meanwhile."""
        await asyncio.sleep(self._config.watched_s)
        if self._is_watched():
            return
        self._asked.clear()
        try:
            async with asyncio.timeout(self._config.alone_s - self._config.watched_s):
                await self._asked.wait()
        except TimeoutError:
            return

    def _is_watched(self) -> bool:
        asked_s = self._asked_s
        return asked_s is not None and self._clock() - asked_s < self._config.patience_s

    def _with_rates(self, model: Model) -> dict[str, Any]:
        servers = [
            {**server, "iterations_per_s": self._rates.get(str(server["peer"]))}
            for server in model["servers"]
        ]
        return {**model, "servers": servers}


def _rates(before: Sequence[Model], after: Sequence[Model], passed_s: float) -> dict[str, float]:
    """Engine iterations per second of each server: who works now."""
    counted = {
        str(server["peer"]): server["iterations"]
        for model in before
        for server in model["servers"]
        if server["iterations"] is not None
    }
    return {
        str(server["peer"]): max(0, server["iterations"] - counted[str(server["peer"])]) / passed_s
        for model in after
        for server in model["servers"]
        if server["iterations"] is not None and str(server["peer"]) in counted and passed_s > 0
    }


@asynccontextmanager
async def observing(
    look: Look, wall_clock: Callable[[], float], config: ObserverConfig | None = None
) -> AsyncIterator[Observer]:
    """An observer that looks inside the context."""
    observer = Observer(look, wall_clock, config)
    task = asyncio.create_task(observer.run(), name="observer")
    try:
        yield observer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
