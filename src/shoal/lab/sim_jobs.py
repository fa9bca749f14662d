"""A request inside fidelity B, and the memory that servers hand out to requests in turn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.lab.sim_result import Served
from shoal.lab.sim_scenario import Request
from shoal.plan.cost import Chain


@dataclass(slots=True)
class Job:
    """One request on its way. Its turn is its place among all requests."""

    turn: int
    request: Request
    epoch: int = 0
    """Rises when it loses its chain: what was scheduled before is void."""
    chain: Chain = ()
    until_s: float = 0.0
    """When the books expect its memory back."""
    booked_s: float = 0.0
    lacking: set[int] = field(default_factory=set)
    """Servers that have not given memory yet."""
    granted: dict[int, int] = field(default_factory=dict)
    """By server: bytes that it holds."""
    held: Chain = ()
    """After a repair: where its positions still are."""
    done: int = 0
    """Tokens answered before the chain that it has now."""
    going_s: float = math.inf
    """When the first token that this chain gives is there,"""
    step_s: float = 0.0
    """and how long each further one takes."""
    start_s: float = math.inf
    first_s: float = math.inf
    end_s: float = math.inf
    repairs: int = 0
    is_cut_off: bool = False
    """Its chain was just lost."""
    error: str = ""

    @property
    def is_booked(self) -> bool:
        """Whether it has a chain, with memory on it or not yet."""
        return bool(self.chain) and not self.end_s < math.inf

    @property
    def is_running(self) -> bool:
        """Whether it has all its memory."""
        return bool(self.chain) and not self.lacking

    @property
    def tokens_held(self) -> int:
        """Positions that a new chain must hold before the next token."""
        return self.request.tokens_in + max(0, self.done - 1)

    def tokens_at(self, now_s: float) -> int:
        """How many tokens are answered by then."""
        if now_s < self.going_s:
            return self.done
        steps = (now_s - self.going_s) / self.step_s if self.step_s else math.inf
        return int(min(self.request.tokens_out, self.done + 1 + math.floor(steps)))

    def result(self) -> Served:
        """What came of it."""
        request = self.request
        return Served(
            client=request.client,
            at_s=request.at_s,
            tokens_in=request.tokens_in,
            tokens_out=request.tokens_out,
            start_s=self.start_s,
            first_s=self.first_s,
            end_s=self.end_s,
            chain=self.chain or self.held,
            repairs=self.repairs,
            error=self.error,
        )


class _Claim(NamedTuple):
    job: Job
    epoch: int
    size_bytes: int


class Memory:
    """By server: bytes for sessions, and who waits for them, first come first served.

    A job claims at all servers of its chain at once and keeps what it got while it waits for
    the rest. Since all claims come in one order there is always one that gets on.
    """

    def __init__(self, capacity: Sequence[int]) -> None:
        self.capacity = list(capacity)
        self.free = list(capacity)
        self._lines: list[deque[_Claim]] = [deque() for _ in capacity]

    def resize(self, capacity: Sequence[int]) -> None:
        """Servers have other blocks now; what jobs hold, they keep."""
        for server, size in enumerate(capacity):
            self.free[server] += size - self.capacity[server]
        self.capacity = list(capacity)

    def claim(self, job: Job, server: int, size_bytes: int) -> None:
        """Stand in line."""
        self._lines[server].append(_Claim(job, job.epoch, size_bytes))

    def grant(self, server: int) -> list[Job]:
        """Serve the line as far as memory goes; returns the jobs that now have all theirs."""
        line, ready = self._lines[server], []
        while line:
            job, epoch, size_bytes = line[0]
            is_void = job.epoch != epoch
            if not is_void and size_bytes > self.free[server]:
                break
            line.popleft()
            if is_void:
                continue
            self.free[server] -= size_bytes
            job.granted[server] = size_bytes
            job.lacking.discard(server)
            if not job.lacking:
                ready.append(job)
        return ready

    def release(self, job: Job) -> list[int]:
        """Take back what a job holds; returns the servers where others may now get some."""
        for server, size_bytes in job.granted.items():
            self.free[server] += size_bytes
        servers = [*job.granted, *job.lacking]
        job.granted.clear()
        job.lacking.clear()
        return servers

    def used(self) -> tuple[float, ...]:
        """By server: the share that is taken."""
        pairs = zip(self.free, self.capacity, strict=True)
        return tuple(1 - free / size if size > 0 else 0.0 for free, size in pairs)
