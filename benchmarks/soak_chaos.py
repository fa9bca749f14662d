"""The failures of soak.py: seeded, on real processes, and everything comes back."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from recovery_servers import Fleet, Member, NotStarted

KINDS: Final = {"kill": 11, "kill span": 2, "term": 4, "stop": 4, "kill client": 1}
"""How often each of them, relative to the others."""

KILLS: Final = ("SIGKILL", "SIGTERM")
DOWN_S_MAX: Final = 2.0
STOPPED_S_MAX: Final = 6.0
LEAVE_S_MAX: Final = 30.0
"""A server that was asked to leave must be gone after this."""

START_TRIES: Final = 5


@dataclass(slots=True)
class Losses:
    """What was done to processes."""

    log: list[tuple[float, str, str]] = field(default_factory=list)
    """(monotonic time, what, to whom)."""
    away: list[tuple[float, float, str]] = field(default_factory=list)
    """(from, to, whom): when servers could not be used, monotonic."""
    leave_s: list[float] = field(default_factory=list)
    """How long those took that were asked to leave."""
    faults: list[str] = field(default_factory=list)
    """What a process did that it must not: not leaving, not starting."""

    def note(self, what: str, whom: str) -> None:
        """It was done just now."""
        self.log.append((round(time.monotonic(), 3), what, whom))

    def counts(self) -> Counter[str]:
        """How often each was done."""
        return Counter(what for _, what, _ in self.log)

    def is_covered(self, names: Collection[str], start_s: float, end_s: float) -> bool:
        """Whether one of these servers could be used at any moment of this time."""
        away = [one for one in self.away if one[2] in names and one[0] < end_s and start_s < one[1]]
        edges = {start_s, *(one[1] for one in away), *(one[0] for one in away)}
        return all(
            sum(1 for one in away if one[0] <= at_s < one[1]) < len(names)
            for at_s in edges
            if start_s <= at_s < end_s
        )

    @property
    def num_kills(self) -> int:
        """Server processes that were killed or asked to leave."""
        return sum(self.counts()[what] for what in KILLS)


class Chaos:
    """Picks victims at random moments until told to stop."""

    def __init__(
        self, servers: Fleet, rng: random.Random, interval_s: float, spared: str,
        kill_client: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:  # fmt: skip
        """`spared` is never killed: its memory is watched. `interval_s` is the mean."""
        self.losses = Losses()
        self._servers = servers
        self._rng = rng
        self._interval_s = interval_s
        self._spared = spared
        self._kill_client = kill_client
        self._away: set[str] = set()
        """Names of those that are down, stopped or starting."""

    async def run(self, until_s: float) -> None:
        """Until this monotonic time; then everybody is back."""
        async with asyncio.TaskGroup() as doing:
            while (now_s := time.monotonic()) < until_s:
                wait_s = min(self._rng.expovariate(1 / self._interval_s), 4 * self._interval_s)
                await asyncio.sleep(min(wait_s, until_s - now_s))
                kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
                if kind == "kill client":
                    self.losses.note("client killed", "client")
                    doing.create_task(self._kill_client())
                    continue
                for member in self._victims(kind):
                    self._away.add(member.name)
                    doing.create_task(self._lose(member, kind))

    def _victims(self, kind: str) -> list[Member]:
        here = [m for m in self._servers.members.values() if m.name not in self._away]
        if kind != "stop":
            here = [member for member in here if member.name != self._spared]
        if not here:
            return []
        victim = self._rng.choice(here)
        if kind == "kill span":
            return [member for member in here if member.blocks == victim.blocks]
        return [victim]

    async def _lose(self, member: Member, kind: str) -> None:
        down_s, since_s = self._rng.uniform(0.0, DOWN_S_MAX), time.monotonic()
        if kind == "stop":
            self.losses.note("SIGSTOP", member.name)
            member.signal(signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(0.2, STOPPED_S_MAX))
            member.signal(signal.SIGCONT)
        else:
            await self._end(member, kind)
            await asyncio.sleep(down_s)
            await self._start(member)
        self.losses.away.append((since_s, time.monotonic(), member.name))
        self._away.discard(member.name)

    async def _end(self, member: Member, kind: str) -> None:
        number = signal.SIGTERM if kind == "term" else signal.SIGKILL
        self.losses.note(number.name, member.name)
        asked_s = time.monotonic()
        member.signal(number)
        if not await member.wait_gone(LEAVE_S_MAX):
            self.losses.faults.append(f"{member.name} did not leave within {LEAVE_S_MAX:.0f} s")
            member.signal(signal.SIGKILL)
            await member.wait_gone(LEAVE_S_MAX)
        elif kind == "term":
            self.losses.leave_s.append(time.monotonic() - asked_s)

    async def _start(self, member: Member) -> None:
        """All whom it could join may be down at the moment: then it tries again, as people do."""
        for _ in range(START_TRIES):
            try:
                await self._servers.start(member.name, member.blocks)
            except NotStarted as failure:
                said = str(failure)
                self.losses.note("start failed", member.name)
                await asyncio.sleep(1.0)
            else:
                return
        self.losses.faults.append(f"{member.name} does not start: {said}")
