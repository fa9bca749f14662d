"""From one placement to another: who moves, what it loads, how long that takes.

A server loads its new span while the old one serves, and drops the old one then; so only
the moment of the switch matters for coverage, and the order of the switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.spans import Span
from shoal.plan.placement import Placement, uncovered
from shoal.plan.spec import Problem

LOAD_BYTES_PER_S: Final = 200e6
"""Rate of loading weights where nothing is said: a slow disk, or 2 Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One server's new span."""

    server: int
    before: Span | None
    after: Span | None
    load_bytes: int
    """Weights that it does not hold yet."""
    load_s: float
    uncovers: tuple[Span, ...]
    """Blocks that nobody hosts from this switch until later ones; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """All moves, in an order that leaves as few blocks uncovered as possible."""

    moves: tuple[Move, ...]

    @property
    def load_bytes(self) -> int:
        """Of all servers together."""
        return sum(move.load_bytes for move in self.moves)

    @property
    def load_s(self) -> float:
        """Until the slowest is done, if all load at once."""
        return max((move.load_s for move in self.moves), default=0.0)

    @property
    def is_seamless(self) -> bool:
        """Whether each block that was hosted stays hosted all the time."""
        return not any(move.uncovers for move in self.moves)


def change_between(
    problem: Problem,
    before: Placement,
    after: Placement,
    load_bytes_per_s: Sequence[float] | None = None,
) -> Change:
    """What getting from `before` to `after` takes; rates are by server."""
    rates = load_bytes_per_s or [LOAD_BYTES_PER_S] * len(problem.servers)
    now = list(before.spans)
    open_moves = [server for server, span in enumerate(after.spans) if span != before.spans[server]]
    was_missing = set(_blocks(uncovered(problem, now)))
    moves = []
    while open_moves:
        server = min(open_moves, key=lambda one: (_harm(problem, now, after, one), one))
        open_moves.remove(server)
        old, new = now[server], after.spans[server]
        now[server] = new
        lost = [
            span
            for span in uncovered(problem, now)
            if not was_missing.issuperset(range(span.start, span.end))
        ]
        size = _new_bytes(problem, old, new)
        moves.append(
            Move(
                server=server,
                before=old,
                after=new,
                load_bytes=size,
                load_s=size / rates[server],
                uncovers=tuple(lost),
            )
        )
        was_missing &= set(_blocks(uncovered(problem, now)))
    return Change(moves=tuple(moves))


def _harm(problem: Problem, now: Sequence[Span | None], after: Placement, server: int) -> int:
    """Blocks without a host once `server` has switched."""
    spans = list(now)
    spans[server] = after.spans[server]
    return sum(map(len, uncovered(problem, spans)))


def _new_bytes(problem: Problem, before: Span | None, after: Span | None) -> int:
    if after is None:
        return 0
    kept = before.overlap(after) if before is not None else None
    return problem.weight_bytes(after) - (problem.weight_bytes(kept) if kept else 0)


def _blocks(spans: Sequence[Span]) -> list[int]:
    return [block for span in spans for block in range(span.start, span.end)]
