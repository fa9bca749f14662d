"""What happened in an incident, as far as it is known: servers, sessions, disturbances.

Times are seconds from the incident's beginning. Servers are called s0, s1, ... and sessions r0,
r1, ..., in the order of their blocks and of their opening, so that an incident and its replay
can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.lab.trace_fates import Disturbance, Life
from shoal.server.events import Began

Hop = tuple[str, int, int]
"""(server's label, first block, block behind the last)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPast:
    """One server: its blocks, and when it was there."""

    label: str
    peer: str
    start: int
    end: int
    began: Began | None
    """How it was set up; None: it recorded nothing, others speak of it."""
    lives: tuple[Life, ...]
    iteration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A chain that a session had."""

    epoch: int
    at_s: float
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What the client did: `count` rows in one entry, or a cut to position `count`."""

    kind: Literal["rows", "cut"]
    at_s: float
    count: int
    want: Literal[0, 1, 2] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPast:
    """One session: its chains, its rows, its end."""

    label: str
    name: str
    owner: str
    opened_ms: int
    parent: str
    """Label of the session that it was forked from, or ""."""
    parent_length: int
    epochs: tuple[Link, ...]
    acts: tuple[Act, ...]
    closed_s: float | None
    evictions: tuple[str, ...]
    """Labels of the servers that took its cache away, in order."""
    failures: tuple[str, ...]
    """"label: code" of each server that could not go on."""
    gaps: int
    stale: int
    standbys: int = 0
    """Of one block, at most: how many the client kept ready."""

    @property
    def chains(self) -> list[tuple[Hop, ...]]:
        """The chains in order, without repetitions."""
        chains: list[tuple[Hop, ...]] = []
        for link in self.epochs:
            if not chains or chains[-1] != link.hops:
                chains.append(link.hops)
        return chains

    @property
    def length(self) -> int:
        """Positions at the end."""
        length = self.parent_length if self.parent else 0
        for act in self.acts:
            length = length + act.count if act.kind == "rows" else act.count
        return length


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Everything that is known."""

    num_blocks: int
    began: Began
    """The bounds of one server, which are taken for all."""
    servers: tuple[ServerPast, ...]
    sessions: tuple[SessionPast, ...]
    disturbances: tuple[Disturbance, ...]
    delay_s: float
    """One way between two servers."""
    end_s: float
    notes: tuple[str, ...] = ()
