"""WS-RR: shortest chains when waiting counts as well, for clients without a dispatcher.

Source: BPRR (arXiv 2512.21884), section on online routing. A session waits for the
slowest of its hops to have memory (`max`); the published rule adds the waits up (`sum`),
an upper bound that is easier to search and works as a price of congestion: measured by
us, it is better for the crowd until servers are overloaded, and `max` is better then.

The search for `max` is ours: for each possible wait the shortest chain over the links
that wait no longer. The paper solves an integer program instead.
"""

from __future__ import annotations

import functools
import math

from shoal.base.spans import Span
from shoal.plan.cost import prices
from shoal.plan.placement import Placement
from shoal.plan.route.contract import Choice, Load, Router, no_chain
from shoal.plan.search import Extra, Found, Search
from shoal.plan.spec import Problem


def route_wsrr(problem: Problem, placement: Placement) -> Router:
    """Least response time plus the sum of the waits: the default."""
    return _Waiting(problem, placement)


def route_wsrr_max(problem: Problem, placement: Placement) -> Router:
    """Least response time plus the longest wait: what one session really takes."""
    return _LongestWait(problem, placement)


class _Waiting:
    def __init__(self, problem: Problem, placement: Placement) -> None:
        self.problem = problem
        self.placement = placement
        self.searches = [
            Search(problem, placement, prices(problem, client, "request"))
            for client in range(problem.num_clients)
        ]
        self.needs = [
            0 if span is None else problem.session_bytes(span) for span in placement.spans
        ]

    def __call__(self, load: Load, client: int) -> Choice:
        found = self.search(load, client)
        if found is None:
            raise no_chain(self.problem, self.placement)
        return Choice(found.chain, load.chain_wait_s(self.problem, found.chain))

    def search(self, load: Load, client: int) -> Found | None:
        extras = [self.extra(load, server) for server in range(len(self.needs))]
        return self.searches[client].cheapest(extras=extras)

    def extra(self, load: Load, server: int) -> Extra | None:
        """What is waited at a server; None where even its whole span has room."""
        if load.free[server] >= self.needs[server]:
            return None

        @functools.cache
        def wait_s(size_bytes: int) -> float:
            return load.wait_s(server, size_bytes)

        def extra(span: Span) -> float:
            return wait_s(self.problem.session_bytes(span))

        return extra


class _LongestWait(_Waiting):
    def search(self, load: Load, client: int) -> Found | None:
        extras = [self.extra(load, server) for server in range(len(self.needs))]
        best: Found | None = None
        for wait_s in self._waits(extras):
            if best is not None and wait_s >= best.seconds:
                break
            limited = [extra and _at_most(extra, wait_s) for extra in extras]
            found = self.searches[client].cheapest(extras=limited)
            if found is not None and (best is None or wait_s + found.seconds < best.seconds):
                best = Found(wait_s + found.seconds, found.chain)
        return best

    def _waits(self, extras: list[Extra | None]) -> list[float]:
        """Every wait that some run has, the shortest first."""
        waits = {0.0}
        for server, extra in enumerate(extras):
            span = self.placement.spans[server]
            if extra is not None and span is not None:
                waits |= {extra(Span(start, span.end)) for start in range(span.start, span.end)}
        return sorted(wait for wait in waits if wait < math.inf)


def _at_most(extra: Extra, wait_s: float) -> Extra:
    """Free while the wait is at most `wait_s`, and not possible beyond."""
    return lambda span: 0.0 if extra(span) <= wait_s else math.inf
