"""Rows per second of placements when links between servers limit, too.

Where only servers limit, what gets through is the worst block's sum of rates (`shoal.plan.rates`).
Where ways between pairs of servers pass only so many rows, it is a largest flow: servers share
their time between runs of blocks, ways have rates. This is the flow that Helix plans with (Mei et
al., ASPLOS'25, arXiv 2406.01566), for placements that are given; `LinkScorer` lets the annealer
find one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from shoal.base.spans import Span
from shoal.plan.compose import Score, Scorer
from shoal.plan.place.program import Program
from shoal.plan.placement import Placement, uncovered
from shoal.plan.rates import Rates
from shoal.plan.spec import Problem

ROWS_MIN: Final = 1e-6
"""Rows per second below which nothing gets through: the solver's rounding."""


class _Group(NamedTuple):
    """Servers that are alike: what passes them may as well be shared out evenly."""

    span: Span
    rows_per_s: float
    """Of each, through all its blocks."""
    network_rows_per_s: float
    way_class: int


class _Way(NamedTuple):
    """From a group to the next, all pairs of servers together; None: the client, at either end."""

    sender: int | None
    receiver: int | None
    num_blocks: int
    """That the receiver then runs: from where the sender ended to its own end."""
    rows_per_s: float


def rows_over_links(problem: Problem, placement: Placement, rates: Rates) -> float:
    """The most rows per second that get through a placement over `Links.server_bytes_per_s`.

    A server may take over within its span and runs to its end, as in Helix; a run of some of
    its blocks takes their share of the time of all. All that comes in and all that goes out, over
    whichever ways, is no more than its own link carries (`ServerSpec.uplink_bytes_per_s` and
    `downlink_bytes_per_s`). Ways to and from clients have that limit alone.

    `rates` as `rates.capped_rates` gives them. Takes milliseconds for dozens of servers, and
    grows with the square of the number of different ones.
    """
    found: dict[_Group, list[int]] = {}
    for server, span in placement.hosted():
        group = _Group(
            span=span,
            rows_per_s=rates[server][len(span) - 1],
            network_rows_per_s=problem.network_rows_per_s(server),
            way_class=problem.way_classes[server],
        )
        found.setdefault(group, []).append(server)
    groups, members = [*found], [*found.values()]
    ways = _ways(problem, groups, members)
    program = Program()
    for way in ways:
        program.variable(cost=-1.0 if way.receiver is None else 0.0, high=way.rows_per_s)
    arriving: list[dict[int, float]] = [{} for _ in groups]
    leaving: list[dict[int, float]] = [{} for _ in groups]
    for number, way in enumerate(ways):
        if way.receiver is not None:
            arriving[way.receiver][number] = 1.0
        if way.sender is not None:
            leaving[way.sender][number] = -1.0
    for group, servers, mine, after in zip(groups, members, arriving, leaving, strict=True):
        count, size = len(servers), len(group.span)
        busy = {one: ways[one].num_blocks / size for one in mine}
        program.row(busy, high=group.rows_per_s * count)
        if group.network_rows_per_s < math.inf:
            program.row(mine, high=group.network_rows_per_s * count)
        program.row(mine | after, low=0.0, high=0.0)
    rows = -program.solve().objective
    return rows if rows > ROWS_MIN else 0.0


def _ways(
    problem: Problem, groups: Sequence[_Group], members: Sequence[Sequence[int]]
) -> list[_Way]:
    links, size = problem.links.server_bytes_per_s, problem.model.row_bytes
    ways = []
    for receiver, group in enumerate(groups):
        span = group.span
        if span.start == 0:
            ways.append(_Way(None, receiver, len(span), math.inf))
        if span.end == problem.num_blocks:
            ways.append(_Way(receiver, None, 0, math.inf))
        for sender, before in enumerate(groups):
            if not span.start <= before.span.end < span.end:
                continue  # nor does anybody go on within its own group
            rows_per_s = math.inf
            if links is not None:
                each = links[members[sender][0]][members[receiver][0]] / size
                rows_per_s = each * len(members[sender]) * len(members[receiver])
            ways.append(_Way(sender, receiver, span.end - before.span.end, rows_per_s))
    return ways


@dataclass(frozen=True, slots=True)
class LinkScorer(Scorer):
    """Seconds per row over the links: the less, the more gets through."""

    rates: Rates

    def __call__(self, placement: Placement) -> Score:
        holes = sum(map(len, uncovered(self.problem, placement.spans)))
        if holes:
            return Score(holes, 0, 0.0)
        rows_per_s = rows_over_links(self.problem, placement, self.rates)
        return Score(0, 0, 1 / rows_per_s) if rows_per_s else Score(0, 1, 0.0)


def link_scorer(problem: Problem, rates: Rates) -> LinkScorer:
    """The scorer of a problem; sessions and prices don't count."""
    return LinkScorer(problem=problem, prices=(), sessions=1, rates=rates)
