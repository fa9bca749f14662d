"""Whose training pass runs next, and when: in the gaps that sessions leave.

A step is one block of one micro-batch, so rows of sessions wait for at most one step. Clients
take turns by the time that their steps took. Where sessions leave no gaps, training gets a
small share of the time all the same, or it would never end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final, Protocol

from shoal.base.ids import PeerId, short

logger = logging.getLogger(__name__)

SHARE_MIN: Final = 0.1
"""Of the time that training gets when sessions want all: they become at most that much slower."""

FORGIVEN_S: Final = 1.0
"""A client is held back by at most as much time as it took more than others."""


class Job(Protocol):
    """A client's pass in one direction."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do: it was answered, or given up."""

    async def step(self) -> None:
        """Run one block; answers when it was the last. Never raises a ShoalError."""


class TrainingQueue:
    """The jobs of all clients. `shoal.server.engine.GapWork`."""

    def __init__(self, *, share_min: float = SHARE_MIN) -> None:
        self.steps = 0
        """Steps that ended."""
        self._share_min = share_min
        self._jobs: dict[PeerId, deque[Job]] = {}
        self._took_s: dict[PeerId, float] = {}
        """Time of each client's steps, since the first of those who wait now."""
        self._last_s = 0.0
        """How long the last step took."""
        self._ended_s = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether there is work."""
        return bool(self._jobs)

    def add(self, client: PeerId, job: Job) -> None:
        """A job comes last in its client's line."""
        if client not in self._jobs:
            # Who comes now has no claim on time that others had before.
            others = [self._took_s[other] for other in self._jobs]
            least_s = min(others, default=0.0)
            self._took_s[client] = max(self._took_s.get(client, least_s), least_s)
            self._jobs[client] = deque()
        self._jobs[client].append(job)

    def remove(self, client: PeerId, job: Job) -> None:
        """A job is given up; one that isn't here (any more) is ignored."""
        self._drop(client, job)

    def forget(self, client: PeerId) -> None:
        """The client is gone."""
        self._jobs.pop(client, None)
        self._took_s.pop(client, None)

    def is_due(self, now_s: float, *, is_idle: bool) -> bool:
        """Whether a step should run now; `is_idle`: no rows of sessions can."""
        if not self._jobs:
            return False
        pause_s = self._last_s * (1 / self._share_min - 1)
        return is_idle or now_s - self._ended_s >= pause_s

    async def step(self) -> None:
        """One step of the client who had least."""
        client = min(self._jobs, key=lambda one: self._took_s[one])
        job = self._jobs[client][0]
        now = asyncio.get_running_loop().time
        started_s = now()
        try:
            if not job.is_over:
                await job.step()
        except Exception:
            logger.exception("training step failed client=%s", short(client))
            self._drop(client, job)
        finally:
            self._ended_s = now()
            self._last_s = self._ended_s - started_s
            self.steps += 1
        if client not in self._jobs:
            return  # left meanwhile
        least_s = min(self._took_s[one] for one in self._jobs)
        took_s = self._took_s[client] + self._last_s
        self._took_s[client] = min(took_s, least_s + max(FORGIVEN_S, self._last_s))
        if job.is_over:
            self._drop(client, job)

    def _drop(self, client: PeerId, job: Job) -> None:
        jobs = self._jobs.get(client)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del self._jobs[client]
        if not self._jobs:
            self._took_s.clear()
