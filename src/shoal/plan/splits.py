"""Is splitting worth it? The fastest chain of one session over 1, 2, 3, ... servers.

A hop costs a delay, so a model that fits into fewer servers is often faster there. The
answer for one number of servers is a set, an order and counts of blocks: the counts are
exact (fastest servers first), sets and orders are tried out if there are few, else chosen
greedily, so a time here is one that can be had, perhaps not the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import Final

from shoal.base.spans import Span
from shoal.plan.cost import Chain, Hop, Prices, chain_s, entry_after, mean_prices
from shoal.plan.spec import Problem

SPLITS_MAX: Final = 8
"""Numbers of servers looked at: what still longer chains do can be seen from these."""

HOPS_MAX: Final = 16
"""A model that takes more servers than this is split, and nobody asks whether to."""

POOL_MAX: Final = 48
"""Of more servers only these are looked at: by time per block, the way there spread over
what each holds."""

SETS_MAX: Final = 500
"""Sets of servers that are all tried,"""

ORDERED_MAX: Final = 4
"""and servers whose orders are all tried."""

_Cost = tuple[int, float]
"""Blocks without room, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The fastest chain found over a number of servers."""

    chain: Chain
    seconds: float
    """Of one decode step of one session, the mean over the clients."""

    @property
    def num_servers(self) -> int:
        """Hops."""
        return len(self.chain)


def fastest_splits(problem: Problem, *, sessions: int = 1) -> tuple[Split, ...]:
    """By rising number of servers; numbers that can't hold the model are left out.

    Empty when it takes more than `HOPS_MAX` servers.

    Each server has to have room for `sessions` sessions beside its blocks. Looks at
    `SPLITS_MAX` numbers from the first that holds the model.
    """
    sizes = [problem.blocks_max(server, sessions) for server in range(len(problem.servers))]
    return _Splitter(problem, sizes).all()


class _Splitter:
    """One problem's sizes and prices."""

    def __init__(self, problem: Problem, sizes: Sequence[int]) -> None:
        self.blocks = problem.num_blocks
        self.sizes = sizes
        self.price = mean_prices(problem, "token")

    def all(self) -> tuple[Split, ...]:
        usable = self.pool()
        most = min(len(usable), self.blocks)
        fewest = self.fewest(usable)
        if fewest > HOPS_MAX:
            return ()
        numbers = range(fewest, min(most, fewest + SPLITS_MAX - 1) + 1)
        found: list[Split] = []
        chosen: tuple[int, ...] = ()
        for number in numbers:
            if number == len(usable):
                chosen = tuple(usable)
            elif math.comb(len(usable), number) <= SETS_MAX:
                chosen = min(combinations(usable, number), key=self.cost)
            else:
                chosen = _improved(self.cost, self._added(chosen, usable, number), usable)
            if not self.cost(chosen)[0]:
                chain = self.chain(chosen)
                found.append(Split(chain=chain, seconds=chain_s(self.price, chain)))
        return tuple(found)

    def pool(self) -> list[int]:
        """The servers that are looked at, by index."""
        price = self.price
        usable = [one for one, size in enumerate(self.sizes) if size]
        usable.sort(key=lambda one: price.block[one] + price.arrive[one] / self.sizes[one])
        return sorted(usable[:POOL_MAX])

    def fewest(self, usable: Sequence[int]) -> int:
        """How many servers it takes at least to hold the model; one more than all: too many."""
        left = self.blocks
        for number, size in enumerate(sorted((self.sizes[one] for one in usable), reverse=True), 1):
            left -= size
            if left <= 0:
                return number
        return len(usable) + 1

    def cost(self, servers: Sequence[int]) -> _Cost:
        """How well these servers together run the model."""
        lacking = self.blocks - sum(self.sizes[one] for one in servers)
        if lacking > 0:
            return lacking, math.inf
        counts = self.counts(servers)
        blocks_s = sum(self.price.block[one] * count for one, count in counts.items())
        return 0, blocks_s + self.way_s(self.ordered(servers))

    def counts(self, servers: Sequence[int]) -> dict[int, int]:
        """Blocks of each: one at least, the fastest as many as it can hold."""
        counts = dict.fromkeys(servers, 1)
        left = self.blocks - len(servers)
        for one in sorted(servers, key=lambda one: (self.price.block[one], one)):
            more = min(left, self.sizes[one] - 1)
            counts[one] += more
            left -= more
        return counts

    def chain(self, servers: Sequence[int]) -> Chain:
        counts = self.counts(servers)
        hops, start = [], 0
        for one in self.ordered(servers):
            hops.append(Hop(one, Span(start, start + counts[one])))
            start += counts[one]
        return tuple(hops)

    def ordered(self, servers: Sequence[int]) -> Sequence[int]:
        """In the order with the shortest way; beyond a few servers, nearest after nearest."""
        if self.price.between is None:
            return servers
        if len(servers) <= ORDERED_MAX:
            return min(permutations(servers), key=self.way_s)
        return min((_nearest(self.price, first, servers) for first in servers), key=self.way_s)

    def way_s(self, order: Sequence[int]) -> float:
        """Seconds of a decode step that are no blocks."""
        total = self.price.arrive[order[0]] + self.price.leave[order[-1]]
        return total + sum(entry_after(self.price, one, other) for one, other in pairwise(order))

    def _added(
        self, chosen: tuple[int, ...], usable: Sequence[int], number: int
    ) -> tuple[int, ...]:
        """`chosen` and the best servers beside it, `number` in all."""
        while len(chosen) < number:
            rest = [one for one in usable if one not in chosen]
            chosen = min(((*chosen, one) for one in rest), key=self.cost)
        return chosen


def _improved(
    cost: Callable[[Sequence[int]], _Cost], chosen: tuple[int, ...], usable: Sequence[int]
) -> tuple[int, ...]:
    """`chosen` with one server after the other replaced by a better one, once around."""
    for place in range(len(chosen)):
        rest = [one for one in usable if one not in chosen]
        options = [(*chosen[:place], one, *chosen[place + 1 :]) for one in rest]
        chosen = min([chosen, *options], key=cost)
    return chosen


def _nearest(price: Prices, first: int, servers: Sequence[int]) -> list[int]:
    order, left = [first], [one for one in servers if one != first]
    while left:
        order.append(min(left, key=lambda one: entry_after(price, order[-1], one)))
        left.remove(order[-1])
    return order
