"""What a placement gives: speeds, response times, memory, replicas.

Speeds are of whole decode passes: when several sessions decode in step, a server's time
per block is that of the batch (`spread`). The bounds of the response time reckon
with the batches that the rate causes (`busy`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.base.spans import Span
from shoal.plan.busy import busiest_rate, busy_response_s
from shoal.plan.compose import Seated, composed, needs_on
from shoal.plan.cost import Chain, prices
from shoal.plan.placement import Placement, free_bytes, replicas, seats
from shoal.plan.policies import solving
from shoal.plan.rates import Rates, rows_through
from shoal.plan.search import Search
from shoal.plan.spec import Problem
from shoal.plan.spread import spread


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUse:
    """One server under a placement."""

    span: Span | None
    memory_bytes: int
    weight_bytes: int
    session_bytes: int
    """Caches and logs of the planned sessions that run here."""
    sessions: int
    """How many of them."""
    seats: int
    """How many it could hold at once if each ran its whole span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A placement's figures. Times are means over the sessions that have a place."""

    unplaced: int
    """Of the workload's sessions, those without a place."""
    alone_s: float
    """A decode step of a session that has the servers to itself; infinite: no chain."""
    step_s: float
    """A decode step when all sessions of the workload decode at once."""
    tokens_per_s: float
    """Of all these sessions together."""
    service_s: float
    """From prompt to last token when all sessions run at once and none waits."""
    response_s: tuple[float, float] | None
    """Bounds of the mean response time at the workload's rate when a dispatcher seats
    requests (theorem 4); None without a rate."""
    requests_per_s_max: float
    """At rates above this queues may grow without end."""
    rows_per_s: float
    """Tokens per second that as many sessions as memory holds could get."""
    rows_unlinked_per_s: float | None
    """The same if no way between servers had a rate; None: none has one."""
    chains: tuple[Seated, ...]
    """Where the workload's sessions run; seconds are a decode step's with all of them there."""
    servers: tuple[ServerUse, ...]
    replicas: tuple[int, ...]
    """By block."""


def look_ahead(problem: Problem, placement: Placement, rates: Rates) -> Outlook:
    """The figures of a placement, which must fit; it need not cover all blocks.

    `rates` is `rates.capped_rates(problem)`, which is worth computing once.

    Raises:
        ConfigError: servers have rates between them, and no solver is installed.
    """
    all_at_once = spread(problem, placement)
    steps = [one for own in all_at_once.seated for one in own]
    count = all_at_once.sessions
    everywhere = composed(problem, placement)
    response = None
    if problem.workload.requests_per_s:
        response = (math.inf, math.inf)
        if everywhere:
            response = busy_response_s(problem, everywhere)
    rows_per_s, unlinked = _rows_per_s(problem, placement, rates)
    return Outlook(
        unplaced=problem.workload.sessions - count,
        alone_s=_alone_s(problem, placement),
        step_s=sum(one.seats * one.seconds for one in steps) / count if count else math.inf,
        tokens_per_s=sum(one.seats / one.seconds if one.seconds else math.inf for one in steps),
        service_s=all_at_once.service_s if count else math.inf,
        response_s=response,
        requests_per_s_max=busiest_rate(problem, everywhere),
        rows_per_s=rows_per_s,
        rows_unlinked_per_s=unlinked,
        chains=_merged(all_at_once.seated),
        servers=_uses(problem, placement, all_at_once.seated),
        replicas=tuple(replicas(problem, placement)),
    )


def _rows_per_s(problem: Problem, placement: Placement, rates: Rates) -> tuple[float, float | None]:
    """Over the links, and without them where they have rates."""
    if problem.links.server_bytes_per_s is None:
        return rows_through(problem, placement, rates), None
    linked = solving("shoal.plan.over_links", "a cluster with rates between servers needs")
    free = replace(problem, links=replace(problem.links, server_bytes_per_s=None))
    return (
        linked.rows_over_links(problem, placement, rates),
        linked.rows_over_links(free, placement, rates),
    )


def _alone_s(problem: Problem, placement: Placement) -> float:
    total = 0.0
    for client in range(problem.num_clients):
        found = Search(problem, placement, prices(problem, client, "token")).cheapest()
        if found is None:
            return math.inf
        total += found.seconds
    return total / problem.num_clients


def _merged(seated: Sequence[Sequence[Seated]]) -> tuple[Seated, ...]:
    """The clients' chains, those with most sessions first."""
    found: dict[Chain, Seated] = {}
    for one in (one for own in seated for one in own):
        known = found.get(one.chain)
        if known is None:
            found[one.chain] = one
            continue
        count = known.seats + one.seats
        seconds = (known.seats * known.seconds + one.seats * one.seconds) / count
        found[one.chain] = Seated(chain=one.chain, seconds=seconds, seats=count)
    return tuple(sorted(found.values(), key=lambda one: (-one.seats, one.seconds)))


def _uses(
    problem: Problem, placement: Placement, seated: Sequence[Sequence[Seated]]
) -> tuple[ServerUse, ...]:
    taken, count = [0] * len(problem.servers), [0] * len(problem.servers)
    for one in (one for own in seated for one in own):
        for server, need in needs_on(problem, one.chain).items():
            taken[server] += need * one.seats
            count[server] += one.seats
    return tuple(
        ServerUse(
            span=span,
            memory_bytes=problem.servers[server].memory_bytes,
            weight_bytes=0 if span is None else problem.weight_bytes(span),
            session_bytes=taken[server],
            sessions=count[server],
            seats=seats(problem, placement, server),
        )
        for server, span in enumerate(placement.spans)
    )


def fits(problem: Problem, placement: Placement) -> bool:
    """Whether all weights fit into their servers' memory."""
    return all(free_bytes(problem, placement, server) >= 0 for server, _ in placement.hosted())
