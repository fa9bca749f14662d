"""Whole models: every server that can hold all blocks does, the others host nothing.

The first thing to compare with: no hop can be cheaper than none.
"""

from __future__ import annotations

import random

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.placement import Placement
from shoal.plan.spec import Problem


def place_whole(problem: Problem, rng: random.Random) -> Placement:
    """The whole model wherever it fits beside one session.

    Raises:
        NoRouteError: it fits nowhere.
    """
    blocks = Span(0, problem.num_blocks)
    spans = tuple(
        blocks if problem.blocks_max(server, 1) == problem.num_blocks else None
        for server in range(len(problem.servers))
    )
    if any(spans):
        return Placement(spans=spans)
    need = problem.weight_bytes(blocks) + problem.session_bytes(blocks)
    have = max((server.memory_bytes for server in problem.servers), default=0)
    raise NoRouteError(
        f"no server can hold the whole model and one session: they need {need / 1e9:.3g} GB, "
        f"the largest server has {have / 1e9:.3g} GB of memory (use a rule that splits it)",
        missing=[(0, problem.num_blocks)],
    )
