"""Response times and largest rates when passes take longer the more sessions share them.

Theorem 4 (`bounds.mean_response_s`) takes a chain's time as given. The papers' servers
take as long for one row as for many; measured ones do not. So the times are those of the
batches that the rate itself causes, found by repetition: sessions in the system by
Little's law, seated fastest chain first, give batches, batches give times, and so on.
With decode times of a single point this is theorem 4 as published.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from shoal.plan.bounds import mean_response_s
from shoal.plan.compose import Seated
from shoal.plan.cost import chain_s, mean_prices
from shoal.plan.spec import Problem, ServerSpec

ROUNDS: Final = 40
"""Repetitions. Each goes half of the way, so batches settle to a part in a million unless
the rate is too high for them to settle at all."""


def busy_response_s(problem: Problem, chains: Sequence[Seated]) -> tuple[float, float]:
    """Lower and upper bound of the mean response time at the workload's rate, seconds.

    `chains` is `compose.composed` of a placement. Infinite from `busiest_rate` on.

    Raises:
        ValueError: no chains, or no rate.
    """
    rate = problem.workload.requests_per_s
    if rate >= busiest_rate(problem, chains):
        return math.inf, math.inf
    if all(len(server.decode.points) == 1 for server in problem.servers):
        return mean_response_s(chains, rate)
    batches = [1.0] * len(problem.servers)
    bounds = (math.inf, math.inf)
    for _ in range(ROUNDS):
        priced = _repriced(problem, chains, batches)
        bounds = mean_response_s(priced, rate)
        if math.isinf(bounds[0]):
            return bounds
        wanted = _batches(problem, priced, rate * bounds[0])
        batches = [(old + new) / 2 for old, new in zip(batches, wanted, strict=True)]
    return bounds


def busiest_rate(problem: Problem, chains: Sequence[Seated]) -> float:
    """Requests per second that chains surely serve; beyond, queues may grow for ever.

    Fastest chain first, each up to what its seats, its servers' time and their networks allow.
    Memory alone gives `sum c_k / T_k`, as published; a server's time counts where its decode
    time was measured by batch, in passes as large as the best of those, and its network where it
    has a rate: each row comes in and goes out once per hop.
    """
    work_s = [_work_s(problem, server) for server in problem.servers]
    rows = problem.workload.tokens_in + problem.workload.tokens_out - 1
    sent_s = [rows / problem.network_rows_per_s(server) for server in range(len(work_s))]
    left = [1.0] * (2 * len(work_s))  # of each server's time, then of each network's
    total = 0.0
    for one in sorted(chains, key=lambda one: one.seconds):
        rate = one.seats / one.seconds if one.seconds else math.inf
        needs: defaultdict[int, float] = defaultdict(float)
        for hop in one.chain:
            needs[hop.server] += len(hop.span) * work_s[hop.server]
            needs[len(work_s) + hop.server] += sent_s[hop.server]
        for what, seconds in needs.items():
            rate = min(rate, left[what] / seconds) if seconds else rate
        for what, seconds in needs.items():
            left[what] = max(0.0, left[what] - rate * seconds)
        total += rate
    return total


def _work_s(problem: Problem, server: ServerSpec) -> float:
    """Seconds of a server's time that a request takes per block; 0 where that is not known."""
    if len(server.decode.points) == 1:
        return 0.0
    batch, seconds = min(server.decode.points, key=lambda point: point[1] / point[0])
    workload = problem.workload
    return server.prefill_s(workload.tokens_in) + (workload.tokens_out - 1) * seconds / batch


def _repriced(problem: Problem, chains: Sequence[Seated], batches: Sequence[float]) -> list[Seated]:
    price = mean_prices(problem, "request", batch=batches)
    return [
        Seated(chain=one.chain, seconds=chain_s(price, one.chain), seats=one.seats)
        for one in chains
    ]


def _batches(problem: Problem, chains: Sequence[Seated], jobs: float) -> list[float]:
    """By server: rows per pass when so many jobs sit on the fastest chains."""
    rows = [0.0] * len(problem.servers)
    for one in sorted(chains, key=lambda one: one.seconds):
        taken = min(jobs, one.seats)
        for server in {hop.server for hop in one.chain}:
            rows[server] += taken
        jobs -= taken
        if jobs <= 0:
            break
    return [max(1.0, count) for count in rows]
