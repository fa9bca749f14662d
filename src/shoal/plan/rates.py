"""Rows per second of servers and of placements, when only the servers limit.

What `shoal.plan.place.flow` maximises; why links need no variables for it is said there.
"""

from __future__ import annotations

import math

from shoal.plan.petals import THROUGHPUT_MAX, Hosting, block_throughputs
from shoal.plan.placement import Placement
from shoal.plan.spec import Problem

Rates = tuple[tuple[float, ...], ...]
"""By server, then by number of hosted blocks less 1: rows per second."""


def decode_rates(problem: Problem) -> Rates:
    """`T_j(k)`: decode rows per second of each server if it hosts k blocks.

    Its batch is as many sessions as its memory holds then, up to the largest that was
    measured; its own link carries each row in and out.
    """
    return tuple(
        tuple(_decode_rate(problem, server, count) for count in range(1, problem.num_blocks + 1))
        for server in range(len(problem.servers))
    )


def capped_rates(problem: Problem) -> Rates:
    """`decode_rates`, none infinite: no more than Petals ever reckons with."""
    return tuple(tuple(min(rate, THROUGHPUT_MAX) for rate in own) for own in decode_rates(problem))


def _decode_rate(problem: Problem, server: int, num_blocks: int) -> float:
    spec = problem.servers[server]
    weights, session = problem.worst_bytes(num_blocks)
    batch = spec.decode.points[-1][0]
    if session:
        batch = min(batch, (spec.memory_bytes - weights) // session)
    if batch < 1 or num_blocks > problem.blocks_max(server, 1):
        return 0.0
    seconds = spec.decode.at(batch) * num_blocks
    network_rows_per_s = problem.network_rows_per_s(server)
    return min(batch / seconds if seconds else math.inf, network_rows_per_s)


def rows_through(problem: Problem, placement: Placement, rates: Rates) -> float:
    """The most rows per second that pass a placement: the worst block's sum of rates."""
    hostings = [
        Hosting(span=span, throughput=rates[server][len(span) - 1])
        for server, span in placement.hosted()
    ]
    return min(block_throughputs(hostings, problem.num_blocks))
