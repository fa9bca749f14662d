"""What a rule of routing is asked, what it answers, and what it may know of the load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.compose import needs_on, room_of
from shoal.plan.cost import Chain
from shoal.plan.placement import Placement, uncovered
from shoal.plan.spec import Problem


class Release(NamedTuple):
    """When a server expects memory back, and how many bytes."""

    at_s: float
    size_bytes: int


class Active(NamedTuple):
    """A session that holds memory along its chain until `until_s`, or waits for it."""

    chain: Chain
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the servers of a placement answer now."""

    now_s: float
    free: tuple[int, ...]
    """By server: bytes for sessions; negative when more is booked than there is."""
    releases: tuple[tuple[Release, ...], ...]
    """By server: what is booked, the earliest first."""
    running: Mapping[Chain, int] = field(default_factory=dict)
    """Sessions by their chain; only a dispatcher knows."""

    def wait_s(self, server: int, size_bytes: int) -> float:
        """Seconds until `size_bytes` are free there; infinite: never."""
        free = self.free[server]
        if free >= size_bytes:
            return 0.0
        for at_s, released in self.releases[server]:
            free += released
            if free >= size_bytes:
                return max(0.0, at_s - self.now_s)
        return math.inf

    def chain_wait_s(self, problem: Problem, chain: Chain) -> float:
        """Seconds until a session could hold all its memory along `chain`."""
        needs = needs_on(problem, chain)
        return max(self.wait_s(server, need) for server, need in needs.items())


def load_of(
    problem: Problem, placement: Placement, sessions: Iterable[Active] = (), now_s: float = 0.0
) -> Load:
    """The load that these sessions make."""
    free = room_of(problem, placement)
    releases: list[list[Release]] = [[] for _ in free]
    running: Counter[Chain] = Counter()
    for chain, until_s in sessions:
        running[chain] += 1
        for hop in chain:
            size = problem.session_bytes(hop.span)
            free[hop.server] -= size
            releases[hop.server].append(Release(until_s, size))
    return Load(
        now_s=now_s,
        free=tuple(free),
        releases=tuple(tuple(sorted(one)) for one in releases),
        running=running,
    )


class Choice(NamedTuple):
    """A chain for a new session, and how long the session has to wait for its memory."""

    chain: Chain
    wait_s: float


class Router(Protocol):
    """A rule of routing for one placement. Made once, asked for each new session.

    None means: wait, and ask again when a session ends (only a dispatcher says so).

    Raises:
        NoRouteError: no chain exists that could ever hold the session.
    """

    def __call__(self, load: Load, client: int) -> Choice | None: ...


class RouterMaker(Protocol):
    """Makes the router of a placement.

    Raises:
        NoRouteError: blocks are uncovered.
    """

    def __call__(self, problem: Problem, placement: Placement) -> Router: ...


def no_chain(problem: Problem, placement: Placement) -> NoRouteError:
    """The error for a placement that can't run a session: uncovered, or too little cache."""
    missing: Sequence[Span] = uncovered(problem, placement.spans)
    if missing:
        text = f"nobody hosts blocks {' and '.join(map(str, missing))} (place them first)"
    else:
        text = (
            "no chain of this placement can hold even one session of "
            f"{problem.workload.tokens_in} + {problem.workload.tokens_out} tokens (host fewer "
            "blocks per server, or plan for shorter sessions)"
        )
    return NoRouteError(text, missing=[(span.start, span.end) for span in missing])
