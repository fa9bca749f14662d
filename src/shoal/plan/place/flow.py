"""Placement for throughput: the most rows per second through all blocks.

The goal is that of Helix (Mei et al., ASPLOS'25, arXiv 2406.01566): maximise the flow
through the placement, where a server that hosts k blocks passes at most `T(k)` rows per
second. The form is ours: classes of equal servers, windows, and flow over boundaries. Its
bound is close to the analytic one (`bounds.throughput_bound`), where the published form's
is useless. Exact when links between servers are not what limits; each server's own link is
part of `T`.
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
from shoal.plan.petals import choose_span
from shoal.plan.place.program import Program
from shoal.plan.placement import Placement, covering
from shoal.plan.spec import Problem

LIMIT_S: Final = 20.0
"""Time for the solver; good placements come early, proofs late."""

FLOWS_MAX: Final = 60_000
"""Flow variables: beyond it, spans begin and end at every second block, every third..."""

Rates = tuple[tuple[float, ...], ...]
"""By server, then by number of hosted blocks less 1: rows per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flowing:
    """A placement with its rows per second, and what none can exceed."""

    placement: Placement
    rows_per_s: float
    bound: float


def place_flow(problem: Problem, rng: random.Random) -> Placement:
    """The placement that `plan_flow` finds within `LIMIT_S`.

    Raises:
        NoRouteError: some block is left over, or no session has room anywhere.
    """
    return plan_flow(problem).placement


def plan_flow(problem: Problem, *, rates: Rates | None = None, limit_s: float = LIMIT_S) -> Flowing:
    """The placement with the most rows per second through all blocks.

    Servers that the flow does not need join where rows per second are fewest.

    Raises:
        NoRouteError: no rows flow at all.
    """
    rates = decode_rates(problem) if rates is None else rates
    classes: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for server, own in enumerate(rates):
        classes[own].append(server)
    program = _Classes(problem.num_blocks, {own: len(who) for own, who in classes.items()})
    solution = program.program.solve(limit_s=limit_s, gap=1e-4)
    if not solution.values or solution.objective >= 0:
        raise NoRouteError(
            "no placement lets any row through all blocks (add memory, or plan for fewer or "
            "shorter sessions)"
        )
    spans: list[Span | None] = [None] * len(problem.servers)
    for own, servers in classes.items():
        windows = program.chosen(own, solution.values)
        for server, span in zip(servers, windows, strict=False):
            spans[server] = span
    placement = covering(problem, _add_spare(spans, rates, problem.num_blocks))
    bound = min(throughput_bound(problem, rates), -solution.bound)
    return Flowing(placement=placement, rows_per_s=max_flow(problem, placement, rates), bound=bound)


def decode_rates(problem: Problem) -> Rates:
    """`T_j(k)`: decode rows per second of each server if it hosts k blocks.

    Its batch is as many sessions as its memory holds then, up to the largest that was
    measured; its own link carries each row in and out.
    """
    return tuple(
        tuple(_decode_rate(problem, server, count) for count in range(1, problem.num_blocks + 1))
        for server in range(len(problem.servers))
    )


def _decode_rate(problem: Problem, server: int, num_blocks: int) -> float:
    spec = problem.servers[server]
    weights, session = problem.worst_bytes(num_blocks)
    batch = spec.decode.points[-1][0]
    if session:
        batch = min(batch, (spec.memory_bytes - weights) // session)
    if batch < 1 or num_blocks > problem.blocks_max(server, 1):
        return 0.0
    seconds = spec.decode.at(batch) * num_blocks
    network = min(spec.network_rows_per_s, spec.link_bytes_per_s / problem.model.row_bytes)
    return min(batch / seconds if seconds else math.inf, network)


def max_flow(problem: Problem, placement: Placement, rates: Rates) -> float:
    """The most rows per second that pass a placement, however they are routed.

    A row runs to the end of each span it enters.
    """
    program = Program()
    borders: list[dict[int, float]] = [{} for _ in range(problem.num_blocks + 1)]
    for server, span in placement.hosted():
        flows = _flows(program, span, borders, range(span.start, span.end))
        program.row(dict.fromkeys(flows, 1.0), high=rates[server][len(span) - 1])
    for terms in borders[1:-1]:
        program.row(terms, low=0, high=0)
    return -program.solve().objective


def _flows(
    program: Program, span: Span, borders: list[dict[int, float]], entries: Sequence[int]
) -> list[int]:
    """Variables of the flow through `span`, by where it enters."""
    flows = []
    for entry in entries:
        flow = program.variable(cost=0.0 if entry else -1.0)
        borders[entry][flow] = 1.0
        borders[span.end][flow] = -1.0
        flows.append(flow)
    return flows


class _Classes:
    """The program; see the module's docstring."""

    def __init__(self, num_blocks: int, classes: dict[tuple[float, ...], int]) -> None:
        self.program = Program()
        self.windows: dict[tuple[float, ...], dict[Span, int]] = {}
        most = [sum(rate > 0 for rate in own) for own in classes]
        unit = 1
        while sum(_num_flows(num_blocks, size, unit) for size in most) > FLOWS_MAX:
            unit += 1
        allowed = [*range(0, num_blocks, unit), num_blocks]
        borders: list[dict[int, float]] = [{} for _ in range(num_blocks + 1)]
        for own, count in classes.items():
            self.windows[own] = {}
            for start in allowed[:-1]:
                for end in (end for end in allowed if start < end and own[end - start - 1] > 0):
                    window = self.program.variable(high=count, integer=True)
                    self.windows[own][Span(start, end)] = window
                    entries = [entry for entry in allowed if start <= entry < end]
                    flows = _flows(self.program, Span(start, end), borders, entries)
                    rate = min(own[end - start - 1], 1e9)
                    self.program.row({**dict.fromkeys(flows, 1.0), window: -rate}, high=0)
            if self.windows[own]:
                self.program.row(dict.fromkeys(self.windows[own].values(), 1.0), high=count)
        for border in allowed[1:-1]:
            if borders[border]:
                self.program.row(borders[border], low=0, high=0)

    def chosen(self, own: tuple[float, ...], values: Sequence[float]) -> list[Span]:
        """The windows of a class, one per server that has one."""
        return [
            span for span, window in self.windows[own].items() for _ in range(round(values[window]))
        ]


def _num_flows(num_blocks: int, size: int, unit: int) -> int:
    starts, lengths = -(-num_blocks // unit), size // unit
    return starts * lengths * (lengths + 1) // 2


def _add_spare(spans: list[Span | None], rates: Rates, num_blocks: int) -> Placement:
    throughputs = [0.0] * num_blocks
    for server, span in enumerate(spans):
        for block in range(span.start, span.end) if span else ():
            throughputs[block] += rates[server][len(span) - 1] if span else 0.0
    for server, span in enumerate(spans):
        sizes = [count for count, rate in enumerate(rates[server], 1) if rate > 0]
        if span is None and sizes:
            size = max(sizes, key=lambda count: (count * rates[server][count - 1], count))
            added = choose_span(throughputs, size)
            spans[server] = added
            for block in range(added.start, added.end):
                throughputs[block] += rates[server][size - 1]
    return Placement(spans=tuple(spans))
