"""A placement: who hosts which blocks, what it leaves free, and how one is asked for.

`Placer` is the contract of all rules of placement (`shoal.plan.place`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span, missing_blocks
from shoal.plan.spec import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """By server: its span, or None when it hosts nothing."""

    spans: tuple[Span | None, ...]
    cache_bytes: tuple[int, ...] | None = None
    """By server: what it keeps for sessions at most; None: all that weights leave."""

    def moved(self, server: int, span: Span | None) -> Placement:
        """The same with one server elsewhere."""
        spans = list(self.spans)
        spans[server] = span
        return replace(self, spans=tuple(spans))

    def hosted(self) -> list[tuple[int, Span]]:
        """The servers that host something, with their spans."""
        return [(server, span) for server, span in enumerate(self.spans) if span is not None]


class Placer(Protocol):
    """A rule of placement.

    Raises:
        NoRouteError: it can't cover all blocks; `missing` names those left over. Another
            rule may: only `bounds.fits_at_all` says that none can.
        ConfigError: the problem is not of a kind that the rule can plan.
    """

    def __call__(self, problem: Problem, rng: random.Random) -> Placement: ...


def free_bytes(problem: Problem, placement: Placement, server: int) -> int:
    """What a server has for sessions, in bytes; negative when weights alone don't fit."""
    span = placement.spans[server]
    if span is None:
        return 0
    left = problem.servers[server].memory_bytes - problem.weight_bytes(span)
    if placement.cache_bytes is not None:
        left = min(left, placement.cache_bytes[server])
    return left


def seats(problem: Problem, placement: Placement, server: int) -> int:
    """How many sessions a server can hold at once if each runs its whole span."""
    span = placement.spans[server]
    if span is None:
        return 0
    each = problem.session_bytes(span)
    return max(0, free_bytes(problem, placement, server) // each) if each else 1 << 30


def replicas(problem: Problem, placement: Placement) -> list[int]:
    """By block: how many servers host it."""
    count = [0] * problem.num_blocks
    for _, span in placement.hosted():
        for block in range(span.start, span.end):
            count[block] += 1
    return count


def uncovered(problem: Problem, spans: Iterable[Span | None]) -> list[Span]:
    """The blocks that nobody hosts."""
    return missing_blocks(Span(0, problem.num_blocks), [span for span in spans if span is not None])


def covering(problem: Problem, placement: Placement) -> Placement:
    """`placement`, if it covers all blocks.

    Raises:
        NoRouteError: it does not; the text says how much memory there is.
    """
    missing = uncovered(problem, placement.spans)
    if not missing:
        return placement
    have = sum(server.memory_bytes for server in problem.servers)
    need = problem.weight_bytes(Span(0, problem.num_blocks))
    raise NoRouteError(
        f"no server is left for blocks {' and '.join(map(str, missing))}: "
        f"all servers together have {have / 1e9:.3g} GB and the weights alone need "
        f"{need / 1e9:.3g} GB (add memory, plan for fewer or shorter sessions, or use "
        "another rule)",
        missing=[(span.start, span.end) for span in missing],
    )


def check_placement(problem: Problem, placement: Placement) -> None:
    """Whether a placement, of ours or from a file, is one of this problem at all.

    Raises:
        ConfigError: a wrong number of servers, a span outside the model, or weights that
            don't fit.
    """
    if len(placement.spans) != len(problem.servers):
        raise ConfigError(
            f"a placement of {len(placement.spans)} servers for {len(problem.servers)}"
        )
    for server, span in placement.hosted():
        name = problem.servers[server].name
        if not len(span) or span.end > problem.num_blocks:
            raise ConfigError(
                f"{name}: {span} is not a span of a model of {problem.num_blocks} blocks"
            )
        if free_bytes(problem, placement, server) < 0:
            raise ConfigError(f"{name}: the weights of {span} don't fit into its memory")
