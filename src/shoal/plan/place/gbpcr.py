"""GBP-CR: greedy block placement with cache reservation, chains laid end to end.

Source: Sun, He and Hou, server chain composition (arXiv 2604.14993), the algorithm of
block placement and the choice of its reservation by the bounds of theorem 4.
"""

from __future__ import annotations

import math
import random
from typing import Final

from shoal.base.spans import Span
from shoal.plan.bounds import mean_response_s
from shoal.plan.compose import composed, scorer
from shoal.plan.cost import mean_prices, typical_entries
from shoal.plan.placement import Placement, covering, uncovered
from shoal.plan.spec import Problem

UTILISATION_MAX: Final = 0.7
"""Chains are added until they would be at most this busy (rho-bar of the paper)."""

RESERVATIONS_MAX: Final = 64
"""Reservations that `place_gbpcr` tries, evenly spread when there are more."""


def place_gbpcr(
    problem: Problem, rng: random.Random, *, reservation: int | None = None
) -> Placement:
    """Chains of servers, each server with cache for `reservation` sessions.

    By default the reservation whose GCA chains have the least lower bound on the mean
    response time at the workload's rate; where no reservation is stable, the one with the
    highest rate of service. Without a rate, the one whose chains are fastest for the
    workload's sessions. All servers are placed, also those beyond the chains that the
    rate needs.

    Raises:
        NoRouteError: not one chain can be completed.
    """
    if reservation is not None:
        return covering(problem, gbpcr(problem, reservation))
    tried = {gbpcr(problem, number): None for number in _reservations(problem)}
    covers = [one for one in tried if not uncovered(problem, one.spans)]
    if not covers:
        return covering(problem, gbpcr(problem, 1))
    return min(covers, key=lambda placement: _merit(problem, placement))


def _merit(problem: Problem, placement: Placement) -> tuple[float, ...]:
    wanted = problem.workload.requests_per_s
    if not wanted:
        return scorer(problem, currency="request")(placement)
    chains = composed(problem, placement)
    rate = sum(chain.seats / chain.seconds for chain in chains if chain.seconds)
    response_s = mean_response_s(chains, wanted)[0] if chains else math.inf
    return response_s, -rate


def _reservations(problem: Problem) -> list[int]:
    """1 to as many as any server could hold of one block, thinned out."""
    weights, session = problem.worst_bytes(1)
    most = max((server.memory_bytes for server in problem.servers), default=0) - weights
    count = max(1, most // session if session else 1)
    if count <= RESERVATIONS_MAX:
        return list(range(1, count + 1))
    # Spread evenly in the logarithm: 1, 2, 3 differ more than 1,001, 1,002, 1,003.
    steps = (count ** (index / (RESERVATIONS_MAX - 1)) for index in range(RESERVATIONS_MAX))
    return sorted({max(1, min(count, round(step))) for step in steps})


def gbpcr(problem: Problem, reservation: int, *, requests_per_s: float | None = None) -> Placement:
    """GBP-CR's placement, whether it completes a chain or not.

    With `requests_per_s` it stops as published, once the chains so far would be at most
    `UTILISATION_MAX` busy; without, every server is placed.
    """
    entries = typical_entries(problem, "request", mean=True)
    block_s = mean_prices(problem, "request").block
    sizes = {
        server: size
        for server in range(len(problem.servers))
        if (size := problem.blocks_max(server, reservation))
    }
    ranked = sorted(sizes, key=lambda one: (entries[one] / sizes[one] + block_s[one], one))
    spans: list[Span | None] = [None] * len(problem.servers)
    start, chain_s, rate = 0, 0.0, 0.0
    for server in ranked:
        size = sizes[server]
        first = min(start, problem.num_blocks - size)
        spans[server] = Span(first, first + size)
        chain_s += entries[server] + block_s[server] * size
        start = first + size
        if start == problem.num_blocks:
            rate += reservation / chain_s if chain_s else math.inf
            if requests_per_s is not None and rate * UTILISATION_MAX >= requests_per_s:
                break
            start, chain_s = 0, 0.0
    return Placement(spans=tuple(spans))
