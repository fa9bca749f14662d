"""What no placement or routing can beat, and what a rule guarantees.

Sources: theorem 2 and the feasibility conditions of BPRR (arXiv 2512.21884), theorem 4 of
the chain composition (Sun, He, Hou, arXiv 2604.14993), the throughput bound of Helix
(Mei et al., ASPLOS'25). The bound of a single request is ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

from shoal.base.spans import Span
from shoal.plan.compose import Seated
from shoal.plan.cost import Currency, Prices, prices
from shoal.plan.place.cgbp import amortised
from shoal.plan.spec import Problem

NEGLIGIBLE: Final = -80.0
"""Natural logarithm of a share far below the rounding of a float (e^-37)."""


def cgbp_guarantee_s(problem: Problem, sessions: int) -> float:
    """Theorem 2: time per token under CG-BP(`sessions`) with at most so many sessions.

    `sum_{j<=K} t_j m_j - tau_K (sum_{j<=K} m_j - L)` over the first K servers by amortised
    time t, K the fewest that cover all L blocks. Infinite when all together don't. Proven
    for hub prices; with push it is only an estimate.
    """
    total, blocks = 0.0, 0
    for one in amortised(problem, sessions):
        total += one.seconds_per_block * one.num_blocks
        blocks += one.num_blocks
        if blocks >= problem.num_blocks:
            over = blocks - problem.num_blocks
            return total - problem.servers[one.server].decode.at(1) * over
    return math.inf


def mean_response_s(chains: Sequence[Seated], requests_per_s: float) -> tuple[float, float]:
    """Theorem 4: lower and upper bound of the mean response time under JFFC, in seconds.

    For Poisson arrivals and exponential job sizes. Infinite when the rate is not below
    what the chains can serve.
    """
    if not chains or not requests_per_s > 0:
        raise ValueError("the bounds need a chain and a rate above 0")
    fastest = sorted(chains, key=lambda one: one.seconds)
    capacity = sum(one.seats / one.seconds if one.seconds else math.inf for one in fastest)
    if math.isinf(capacity):
        return fastest[0].seconds, fastest[-1].seconds
    if requests_per_s >= capacity:
        return math.inf, math.inf
    low, high = (
        _mean_jobs(order, requests_per_s, capacity) / requests_per_s
        for order in (fastest, fastest[::-1])
    )
    return low, high


def _mean_jobs(order: Sequence[Seated], rate: float, capacity: float) -> float:
    """Mean number in system of the birth-death chain that fills `order` from the front.

    In logarithms, scaled by the largest term: the products underflow for 100 places.
    """
    logs = _log_terms(order, rate)
    peak = max(logs)
    terms = [math.exp(value - peak) for value in logs]
    places, busy = len(terms) - 1, rate / capacity
    full = terms.pop()
    normal = sum(terms) + full / (1 - busy)
    jobs = sum(count * term for count, term in enumerate(terms))
    return (jobs + full * (busy / (1 - busy) ** 2 + places / (1 - busy))) / normal


def _log_terms(order: Sequence[Seated], rate: float) -> list[float]:
    """Logarithms of the unscaled probabilities of 0, 1, ... jobs, up to all places taken.

    The steps only fall, so once a term is `NEGLIGIBLE` beside the largest all later are.
    """
    logs = [0.0]
    speed, peak = 0.0, 0.0
    for one in order:
        for _ in range(one.seats):
            speed += 1 / one.seconds
            logs.append(logs[-1] + math.log(rate / speed))
            peak = max(peak, logs[-1])
            if logs[-1] < peak + NEGLIGIBLE:
                return logs
    return logs


def request_bound_s(problem: Problem, *, currency: Currency = "token") -> float:
    """No placement serves the workload's sessions faster than this on average, seconds.

    The best one session alone could get: servers in any order, each with as many blocks
    as it can hold beside that session, no hop cheaper than its cheapest way in. Infinite
    when all servers together can't hold the blocks.
    """
    sessions = problem.workload.sessions
    bounds = [
        share * _single(problem, prices(problem, client, currency))
        for client, share in enumerate(problem.shares(sessions))
        if share
    ]
    return sum(bounds) / sessions


def _single(problem: Problem, price: Prices) -> float:
    """Fewest seconds to gather all blocks: servers one by one, by blocks gathered."""
    entries = _least_entries(price)
    best = [0.0, *[math.inf] * problem.num_blocks]
    for server, entry in enumerate(entries):
        size = _most_blocks(problem, server)
        if not size:
            continue
        block = price.block[server]
        after = list(best)
        window: deque[tuple[float, int]] = deque()
        for count in range(problem.num_blocks + 1):
            while window and window[0][1] < count - size:
                window.popleft()
            if window:
                after[count] = min(after[count], window[0][0] + entry + block * count)
            value = best[count] - block * count
            while window and window[-1][0] >= value:
                window.pop()
            if value < math.inf:
                window.append((value, count))
        best = after
    return best[-1] + min(price.leave, default=0.0)


def _most_blocks(problem: Problem, server: int) -> int:
    """At most how many blocks a server can ever run for one session: the lightest ones."""
    spec = problem.servers[server]
    most = problem.num_blocks if spec.num_blocks_max is None else spec.num_blocks_max
    left = spec.memory_bytes - problem.log_bytes
    for count, size in enumerate(problem.lightest_blocks):
        left -= size
        if left < 0:
            return min(count, most)
    return min(problem.num_blocks, most)


def _least_entries(price: Prices) -> list[float]:
    between = price.between
    if between is None:
        return list(price.arrive)
    return [
        min([arrive, *(row[server] for sender, row in enumerate(between) if sender != server)])
        for server, arrive in enumerate(price.arrive)
    ]


def fits_at_all(problem: Problem, sessions: int = 1) -> bool:
    """Whether all memory together would hold it all; False: no rule can place it."""
    blocks = Span(0, problem.num_blocks)
    caches = problem.session_bytes(blocks)
    have = sum(server.memory_bytes for server in problem.servers)
    return have >= problem.weight_bytes(blocks) + sessions * caches


def throughput_bound(problem: Problem, rows_per_s: Sequence[Sequence[float]]) -> float:
    """Helix' bound: no placement passes more rows per second through all blocks.

    `rows_per_s[server][k - 1]` when it hosts k blocks: `sum_j max_k k T_j(k) / L`.
    """
    best = (
        max((count * rate for count, rate in enumerate(rates, 1)), default=0.0)
        for rates in rows_per_s
    )
    return sum(best) / problem.num_blocks
