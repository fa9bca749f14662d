"""Petals' placement: servers join one after the other, each where it is worst.

The rules themselves are in `shoal.plan.petals`, for servers that join for real. Sources:
the same, and for the number of blocks and the joining order how the authors of BPRR
(arXiv 2512.21884) simulate Petals.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from shoal.base.spans import Span
from shoal.plan.petals import (
    Hosting,
    block_throughputs,
    choose_move,
    choose_span,
    server_throughput,
)
from shoal.plan.placement import Placement, covering
from shoal.plan.spec import Problem

CACHE_TOKENS: Final = 4096
"""Attention cache that Petals keeps per block, whatever the workload,"""

CACHE_TOKENS_GROUPED: Final = 16384
"""and where keys and values are shared by several heads."""

SPARE_BYTES: Final = 2 << 30
"""What it leaves to the runtime, for a model"""

SPARE_HIDDEN_SIZE: Final = 14336
"""of this hidden size; others in proportion."""

CHECKS_PER_SERVER: Final = 10
"""Rounds of rebalancing checks after which a placement is taken as it is."""


def place_petals(problem: Problem, rng: random.Random) -> Placement:
    """All join in random order; then they check, one at a time, until nobody moves.

    Raises:
        NoRouteError: some block is left over.
    """
    joined = _join_all(problem, rng)
    hosted = joined.hosted()
    order = [server for server, _ in hosted]
    hostings = [hosting(problem, server, span) for server, span in hosted]
    for _ in range(CHECKS_PER_SERVER):
        has_moved = False
        for index in rng.sample(range(len(order)), len(order)):
            target = choose_move(hostings, index, problem.num_blocks, rng)
            if target is not None:
                hostings[index] = hosting(problem, order[index], target)
                has_moved = True
        if not has_moved:
            break
    for server, one in zip(order, hostings, strict=True):
        joined = joined.moved(server, one.span)
    return covering(problem, joined)


def place_petals_joins(problem: Problem, rng: random.Random) -> Placement:
    """All join in random order and stay there, as the BPRR simulator has it.

    Raises:
        NoRouteError: some block is left over.
    """
    return covering(problem, _join_all(problem, rng))


def petals_blocks(problem: Problem, server: int) -> int:
    """How many blocks Petals would host there: its cache is fixed, its spare memory too."""
    spare = SPARE_BYTES * problem.model.hidden_size // SPARE_HIDDEN_SIZE
    left = problem.servers[server].memory_bytes - spare
    sizes = [
        weights + cache
        for weights, cache in zip(problem.model.weight_bytes, _caches(problem), strict=True)
    ]
    most = problem.servers[server].num_blocks_max or problem.num_blocks
    return max(0, min(left // max(sizes), most, problem.num_blocks))


def petals_cache_bytes(problem: Problem, span: Span) -> int:
    """The cache that Petals keeps for `span`."""
    return sum(_caches(problem)[span.start : span.end])


def _caches(problem: Problem) -> list[int]:
    model = problem.model
    return [
        cache.session_bytes(
            CACHE_TOKENS
            if cache.values_per_token >= 2 * model.hidden_size
            else CACHE_TOKENS_GROUPED
        )
        for cache in model.caches
    ]


def _join_all(problem: Problem, rng: random.Random) -> Placement:
    count = len(problem.servers)
    sizes = [petals_blocks(problem, server) for server in range(count)]
    return join_in_order(problem, rng.sample(range(count), count), sizes)


def join_in_order(problem: Problem, order: Sequence[int], sizes: Sequence[int]) -> Placement:
    """The servers join one after the other; `sizes` says how many blocks each server takes.

    Petals' cache for its blocks is kept by each. It need not cover the model.
    """
    spans: list[Span | None] = [None] * len(problem.servers)
    caches = [0] * len(spans)
    throughputs = [0.0] * problem.num_blocks
    for server in order:
        num_blocks = sizes[server]
        if not num_blocks:
            continue
        span = choose_span(throughputs, num_blocks)
        spans[server], caches[server] = span, petals_cache_bytes(problem, span)
        added = block_throughputs([hosting(problem, server, span)], problem.num_blocks)
        throughputs = [old + new for old, new in zip(throughputs, added, strict=True)]
    return Placement(spans=tuple(spans), cache_bytes=tuple(caches))


def hosting(problem: Problem, server: int, span: Span) -> Hosting:
    """A server with its throughput, as Petals' rules want it."""
    spec = problem.servers[server]
    return Hosting(
        span=span,
        throughput=server_throughput(spec.rows_per_s, len(span), spec.network_rows_per_s),
    )
