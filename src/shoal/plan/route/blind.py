"""Routing that does not see queues: the shortest chain, and Petals' rule.

Sources: BPRR (arXiv 2512.21884), lemma 3: with at most as many sessions as CG-BP was made
for the shortest chain is optimal; Petals' client as released, its constants below.
"""

from __future__ import annotations

from typing import Final

from shoal.base.spans import Span
from shoal.plan.cost import Prices, prices
from shoal.plan.placement import Placement
from shoal.plan.route.contract import Choice, Load, Router, no_chain
from shoal.plan.search import Found, Search
from shoal.plan.spec import Problem

PETALS_HANDLING_S: Final = 0.018
"""What Petals adds per hop for serialisation."""

PETALS_FULL_S: Final = 10.0
"""What it adds for a server without room in its cache."""

PETALS_RTT_S: Final = 0.15
"""Half of what it assumes of a round trip that it did not measure (used as it is),"""

PETALS_DELAY_S_MAX: Final = 5.0
"""and the most it believes of half a measured one."""


def route_shortest(problem: Problem, placement: Placement) -> Router:
    """The chain with the least response time if nobody had to wait."""
    searches = [
        Search(problem, placement, prices(problem, client, "request"))
        for client in range(problem.num_clients)
    ]
    return _Blind(problem, placement, [search.cheapest() for search in searches])


class _Blind:
    """Always the same chain."""

    def __init__(self, problem: Problem, placement: Placement, chains: list[Found | None]) -> None:
        self.problem = problem
        self.chains = [found.chain for found in chains if found is not None]
        if len(self.chains) < len(chains):
            raise no_chain(problem, placement)

    def __call__(self, load: Load, client: int) -> Choice:
        chain = self.chains[client]
        return Choice(chain, load.chain_wait_s(self.problem, chain))


def route_petals(problem: Problem, placement: Placement) -> Router:
    """Petals' rule: its own guess of a decode step, and 10 s for a full server."""
    return _Petals(problem, placement)


class _Petals:
    def __init__(self, problem: Problem, placement: Placement) -> None:
        self.problem = problem
        self.searches = [
            Search(problem, placement, petals_prices(problem, client), exits="end")
            for client in range(problem.num_clients)
        ]
        self.needs = [
            0 if span is None else problem.session_bytes(span) for span in placement.spans
        ]
        if any(search.cheapest() is None for search in self.searches):
            raise no_chain(problem, placement)

    def __call__(self, load: Load, client: int) -> Choice | None:
        extras = [
            _full if need > free else None for need, free in zip(self.needs, load.free, strict=True)
        ]
        found = self.searches[client].cheapest(extras=extras)
        if found is None:
            return None
        return Choice(found.chain, load.chain_wait_s(self.problem, found.chain))


def _full(span: Span) -> float:
    return PETALS_FULL_S


def petals_prices(problem: Problem, client: int) -> Prices:
    """What Petals' client believes a decode step to cost; servers send to each other."""
    links = problem.links
    count = len(problem.servers)
    near = [_delay(rtt) for rtt in links.client_rtt_s[client]]
    between = links.server_rtt_s or ((2 * PETALS_RTT_S,) * count,) * count
    return Prices(
        arrive=tuple(delay + PETALS_HANDLING_S for delay in near),
        between=tuple(tuple(_delay(rtt) + PETALS_HANDLING_S for rtt in row) for row in between),
        leave=tuple(near),
        block=tuple(server.decode.at(1) for server in problem.servers),
    )


def _delay(rtt_s: float) -> float:
    return min(rtt_s / 2, PETALS_DELAY_S_MAX)
