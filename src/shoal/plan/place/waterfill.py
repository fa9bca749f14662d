"""Water-filled pipelines: separate chains, each split by speed within its memory.

Source: Parallax (arXiv 2509.26182), phases 1 and 2: the number of chains k maximises
`k^2 / hops`, and within a chain each server gets blocks in proportion to its speed, up to
what it can hold. Chains are dealt greedily here; Parallax searches for the fewest hops.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.base.spans import Span
from shoal.plan.cost import Prices, entry_after, mean_prices
from shoal.plan.petals import choose_span
from shoal.plan.placement import Placement, covering, replicas
from shoal.plan.spec import Problem


def place_waterfill(
    problem: Problem, rng: random.Random, *, chains: int | None = None
) -> Placement:
    """`chains` separate chains (default: as many as pay); who is left over joins the rest.

    Raises:
        NoRouteError: so many chains can't be completed.
    """
    numbers = [chains] if chains else range(1, len(problem.servers) + 1)
    dealt = [groups for number in numbers if (groups := _deal(problem, number))]
    if not dealt:
        return covering(problem, Placement(spans=(None,) * len(problem.servers)))
    groups = max(dealt, key=lambda one: len(one) ** 2 / sum(map(len, one)))
    price = mean_prices(problem, "token")
    spans: list[Span | None] = [None] * len(problem.servers)
    sizes = _sizes(problem, len(groups))
    for group in groups:
        start = 0
        ordered = _nearest_first(price, group)
        counts = fill([sizes[one] for one in ordered], _speeds(price, ordered), problem.num_blocks)
        for server, count in zip(ordered, counts, strict=True):
            spans[server] = Span(start, start + count) if count else None
            start += count
    return covering(problem, _add_spare(problem, spans, sizes))


def fill(sizes: Sequence[int], speeds: Sequence[float], num_blocks: int) -> list[int]:
    """`num_blocks` shared out in proportion to `speeds`, none more than its size.

    The level at which `sum min(size, level * speed)` is all blocks, rounded down; the
    largest remainders get one more. The sizes together must do.
    """
    level, open_to = 0.0, list(range(len(sizes)))
    left = float(num_blocks)
    while open_to:
        level = left / sum(speeds[one] for one in open_to)
        full = [one for one in open_to if level * speeds[one] >= sizes[one]]
        if not full:
            break
        left -= sum(sizes[one] for one in full)
        open_to = [one for one in open_to if one not in full]
    exact = [
        level * speed if index in open_to else float(size)
        for index, (size, speed) in enumerate(zip(sizes, speeds, strict=True))
    ]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda one: counts[one] - exact[one])
    while sum(counts) < num_blocks:
        for one in by_remainder:
            if counts[one] < sizes[one] and sum(counts) < num_blocks:
                counts[one] += 1
    return counts


def _sizes(problem: Problem, chains: int) -> list[int]:
    """By server: blocks it can hold with its chain's share of the sessions."""
    share = -(-problem.workload.sessions // chains)
    return [problem.blocks_max(server, share) for server in range(len(problem.servers))]


def _deal(problem: Problem, chains: int) -> list[list[int]]:
    """The servers of each chain, the largest first to whoever needs most; [] if too few."""
    sizes = _sizes(problem, chains)
    groups: list[list[int]] = [[] for _ in range(chains)]
    needs = [problem.num_blocks] * chains
    for server in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        chain = max(range(chains), key=lambda one: needs[one])
        if needs[chain] <= 0 or not sizes[server]:
            break
        groups[chain].append(server)
        needs[chain] -= sizes[server]
    return groups if max(needs) <= 0 else []


def _speeds(price: Prices, servers: Sequence[int]) -> list[float]:
    return [1 / max(price.block[server], 1e-9) for server in servers]


def _nearest_first(price: Prices, servers: Sequence[int]) -> list[int]:
    """The servers, each the nearest to the one before."""
    left = list(servers)
    ordered = [min(left, key=lambda one: price.arrive[one])]
    left.remove(ordered[0])
    while left:
        ordered.append(min(left, key=lambda one: entry_after(price, ordered[-1], one)))
        left.remove(ordered[-1])
    return ordered


def _add_spare(problem: Problem, spans: list[Span | None], sizes: Sequence[int]) -> Placement:
    """Servers without a chain go where there are fewest replicas."""
    for server, size in enumerate(sizes):
        if spans[server] is None and size:
            count = replicas(problem, Placement(spans=tuple(spans)))
            spans[server] = choose_span(count, size)
    return Placement(spans=tuple(spans))
