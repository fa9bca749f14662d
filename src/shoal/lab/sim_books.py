"""What is booked at servers, kept up to date: the `Load` that rules of routing are shown.

The same as `load_of` says for all sessions; a test compares them. Simulations ask at each
arrival, and most servers have not changed since.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from shoal.plan.compose import room_of
from shoal.plan.cost import Chain
from shoal.plan.placement import Placement
from shoal.plan.route.contract import Load, Release
from shoal.plan.spec import Problem


class Books:
    """Bookings of sessions on one placement."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self._problem = problem
        self._free = room_of(problem, placement)
        self._releases: list[list[Release]] = [[] for _ in self._free]
        self._frozen: list[tuple[Release, ...] | None] = [()] * len(self._free)
        self._running: Counter[Chain] = Counter()

    def book(self, chain: Chain, until_s: float) -> None:
        """A session wants its memory along `chain` until then."""
        self._running[chain] += 1
        for server, release in self._parts(chain, until_s):
            self._free[server] -= release.size_bytes
            insort(self._releases[server], release)
            self._frozen[server] = None

    def cancel(self, chain: Chain, until_s: float) -> None:
        """A booking is over."""
        self._running[chain] -= 1
        if not self._running[chain]:
            del self._running[chain]
        for server, release in self._parts(chain, until_s):
            self._free[server] += release.size_bytes
            releases = self._releases[server]
            del releases[bisect_left(releases, release)]
            self._frozen[server] = None

    def load(self, now_s: float) -> Load:
        """All bookings now."""
        return Load(
            now_s=now_s,
            free=tuple(self._free),
            releases=tuple(map(self._of, range(len(self._free)))),
            running=self._running,
        )

    def _of(self, server: int) -> tuple[Release, ...]:
        frozen = self._frozen[server]
        if frozen is None:
            frozen = self._frozen[server] = tuple(self._releases[server])
        return frozen

    def _parts(self, chain: Chain, until_s: float) -> list[tuple[int, Release]]:
        size_of = self._problem.session_bytes
        return [(hop.server, Release(until_s, size_of(hop.span))) for hop in chain]
