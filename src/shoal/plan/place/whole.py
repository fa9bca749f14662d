"""Whole models: every server that can hold all blocks does, the others host nothing.

The first thing to compare with: no hop can be cheaper than none.
"""

from __future__ import annotations

import random

from shoal.base.spans import Span
from shoal.plan.placement import Placement, covering
from shoal.plan.spec import Problem


def place_whole(problem: Problem, rng: random.Random) -> Placement:
    """The whole model wherever it fits beside one session.

    Raises:
        NoRouteError: it fits nowhere.
    """
    blocks = Span(0, problem.num_blocks)
    fits = (
        problem.blocks_max(server, 1) == problem.num_blocks
        for server in range(len(problem.servers))
    )
    return covering(problem, Placement(spans=tuple(blocks if one else None for one in fits)))
