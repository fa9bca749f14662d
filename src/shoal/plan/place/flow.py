"""Placement for throughput: the most rows per second through all blocks.

The goal is that of Helix (Mei et al., ASPLOS'25, arXiv 2406.01566): maximise the flow
through the placement, where a server that hosts k blocks passes at most `T(k)` rows per
second. Helix solves it with variables for links, and its bound is of no use.

Where only servers limit (each one's own link is part of `T`), links need no variables,
for the largest flow is the worst block's sum of rates: rows that leave a server at some
border always find room beyond it, since all rows under way are no more than the flow, and
the servers of the next block together pass at least that. So the program only chooses
windows, for classes of equal servers, and raises the worst block. That is Petals' goal as
well; its rule pursues it greedily, this one with a bound. The argument and form are ours.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.bounds import throughput_bound
from shoal.plan.petals import THROUGHPUT_MAX, Hosting, choose_span, settled
from shoal.plan.place.program import Program
from shoal.plan.placement import Placement
from shoal.plan.rates import Rates, decode_rates, rows_through
from shoal.plan.spec import Problem

BRANCHING: Final = 1_500_000
"""Branches of the solver's search, times its variables: 2 to 20 s a time on one core. Good
placements come early, proofs late."""

BRANCHES_MIN: Final = 50
"""For the largest programs."""

GAP: Final = 1e-4
"""The solver stops at this share from its own bound,"""

GOOD_ENOUGH: Final = 0.98
"""and planning at this share of the analytic bound, as Helix does."""

SOLVED_MAX: Final = 30_000
"""Windows of all classes beyond which the solver does not come far, and is not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flowing:
    """A placement with its rows per second, and what none can exceed."""

    placement: Placement
    rows_per_s: float
    bound: float


def place_flow(problem: Problem, rng: random.Random) -> Placement:
    """The placement that `plan_flow` finds.

    Raises:
        NoRouteError: some block is left over, or no session has room anywhere.
    """
    return plan_flow(problem).placement


def plan_flow(
    problem: Problem,
    *,
    rates: Rates | None = None,
    limit_s: float | None = None,
    branches_max: int | None = None,
) -> Flowing:
    """The placement with the most rows per second through all blocks.

    First by Petals' rule, every server at the length at which it does the most work: that
    is quick and often nearly all that can be had. Then, unless it is, by the solver, first
    with these lengths and then with all, as long as there are not too many different
    servers. It ends after `branches_max` branches each time, by default as many as `BRANCHING`
    allows, and what it has found then is the same on every machine; not so where `limit_s` is
    given and over before.

    Servers that the flow does not need join where rows per second are fewest.

    Raises:
        NoRouteError: no rows flow at all.
    """
    if rates is None:
        rates = decode_rates(problem)
    rates = tuple(tuple(min(rate, THROUGHPUT_MAX) for rate in own) for own in rates)
    bound = throughput_bound(problem, rates)
    placement = _balanced(problem.num_blocks, rates)
    rows_per_s = rows_through(problem, placement, rates)
    for is_full in (True, False):
        if rows_per_s >= GOOD_ENOUGH * bound:
            break
        solved, least = _solve(
            problem,
            rates,
            limit_s=None if limit_s is None else limit_s / 2,
            branches_max=branches_max,
            is_full=is_full,
        )
        if not is_full:
            bound = min(bound, least)
        if solved is not None and rows_through(problem, solved, rates) > rows_per_s:
            placement, rows_per_s = solved, rows_through(problem, solved, rates)
    if not rows_per_s:
        raise NoRouteError(
            "no placement lets any row through all blocks (add memory, or plan for fewer or "
            "shorter sessions)"
        )
    return Flowing(placement=placement, rows_per_s=rows_per_s, bound=bound)


def _balanced(num_blocks: int, rates: Rates) -> Placement:
    """Petals' rule, the fastest first, all at their best lengths, until nobody moves."""
    hostings: dict[int, Hosting] = {}
    throughputs = [0.0] * num_blocks
    for server in sorted(range(len(rates)), key=lambda one: (-max(rates[one]), one)):
        if not any(rates[server]):
            continue
        size = _best_length(rates[server])
        one = Hosting(span=choose_span(throughputs, size), throughput=rates[server][size - 1])
        hostings[server] = one
        for block in range(one.span.start, one.span.end):
            throughputs[block] += one.throughput
    found = settled(list(hostings.values()), num_blocks, random.Random(0))
    at = dict(zip(hostings, found, strict=True))
    return Placement(spans=tuple(at.get(server) for server in range(len(rates))))


def _solve(
    problem: Problem,
    rates: Rates,
    *,
    limit_s: float | None,
    branches_max: int | None,
    is_full: bool,
) -> tuple[Placement | None, float]:
    """What the solver finds within its limits, and its bound."""
    classes: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for server, own in enumerate(rates):
        classes[own].append(server)
    lengths = (1 if is_full else sum(rate > 0 for rate in own) for own in classes)
    if sum(lengths) * problem.num_blocks > SOLVED_MAX:
        return None, math.inf
    program = _Classes(problem.num_blocks, {own: len(who) for own, who in classes.items()}, is_full)
    if branches_max is None:
        branches_max = max(BRANCHES_MIN, BRANCHING // program.program.num_variables)
    solution = program.program.solve(limit_s=limit_s, gap=GAP, branches_max=branches_max)
    if not solution.values:
        return None, -solution.bound
    spans: list[Span | None] = [None] * len(problem.servers)
    for own, servers in classes.items():
        for server, span in zip(servers, program.chosen(own, solution.values), strict=False):
            spans[server] = span
    return _add_spare(spans, rates, problem.num_blocks), -solution.bound


class _Classes:
    """The program: how many servers of a class have which window; see the module."""

    def __init__(
        self, num_blocks: int, classes: dict[tuple[float, ...], int], is_full: bool
    ) -> None:
        self.program = Program()
        worst = self.program.variable(cost=-1.0)
        blocks: list[dict[int, float]] = [{worst: -1.0} for _ in range(num_blocks)]
        self.windows: dict[tuple[float, ...], dict[Span, int]] = {}
        for own, count in classes.items():
            windows = self.windows[own] = {}
            lengths = [length for length, rate in enumerate(own, 1) if rate > 0]
            for length in [_best_length(own)] if lengths and is_full else lengths:
                for start in range(num_blocks - length + 1):
                    window = self.program.variable(high=count, integer=True)
                    windows[Span(start, start + length)] = window
                    for terms in blocks[start : start + length]:
                        terms[window] = own[length - 1]
            if windows:
                self.program.row(dict.fromkeys(windows.values(), 1.0), high=count)
        for terms in blocks:
            self.program.row(terms, low=0)

    def chosen(self, own: tuple[float, ...], values: Sequence[float]) -> list[Span]:
        """The windows of a class, one per server that has one."""
        return [
            span for span, window in self.windows[own].items() for _ in range(round(values[window]))
        ]


def _best_length(own: Sequence[float]) -> int:
    """The number of blocks at which a server does the most work, of equals the largest."""
    work = [round(count * rate, 6) for count, rate in enumerate(own, 1)]
    return max(range(1, len(own) + 1), key=lambda count: (work[count - 1], count))


def _add_spare(spans: list[Span | None], rates: Rates, num_blocks: int) -> Placement:
    throughputs = [0.0] * num_blocks
    for server, span in enumerate(spans):
        for block in range(span.start, span.end) if span else ():
            throughputs[block] += rates[server][len(span) - 1] if span else 0.0
    for server, span in enumerate(spans):
        if span is None and any(rates[server]):
            size = _best_length(rates[server])
            added = choose_span(throughputs, size)
            spans[server] = added
            for block in range(added.start, added.end):
                throughputs[block] += rates[server][size - 1]
    return Placement(spans=tuple(spans))
