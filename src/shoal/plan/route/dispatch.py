"""GCA and JFFC: a dispatcher that knows all sessions, with one queue for all.

Source: Sun, He and Hou, server chain composition (arXiv 2604.14993): chains with
capacities, composed once per placement (`shoal.plan.compose`), and join the fastest free
chain. When none is free a session waits in one queue, first come first served, and takes
the first place that is freed. That is throughput-optimal (lemma 3 there).
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.plan.compose import composed
from shoal.plan.placement import Placement
from shoal.plan.route.contract import Choice, Load, Router, no_chain
from shoal.plan.spec import Problem


def route_dispatch(problem: Problem, placement: Placement) -> Router:
    """Join the fastest free chain; None: queue until a session ends."""
    return FastestFree(problem, placement)


class FastestFree:
    """The rule for one placement; `batches` as `shoal.plan.compose.composed` takes them."""

    def __init__(self, problem: Problem, placement: Placement, batches: Sequence[int] = ()) -> None:
        self.chains = composed(problem, placement, batches)
        if not self.chains:
            raise no_chain(problem, placement)

    def __call__(self, load: Load, client: int) -> Choice | None:
        for one in self.chains:
            if load.running.get(one.chain, 0) < one.seats:
                return Choice(one.chain, 0.0)
        return None
