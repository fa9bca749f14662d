"""SWARM's placement on Helix' machines, and what it hangs on: how many blocks a stage has.

SWARM (Ryabinin et al., ICML'23) has equal stages, and a machine serves one of them whole. Helix
(arXiv 2406.01566) compares with it, but how many stages its version has is not known to us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from shoal.base.spans import Span
from shoal.lab.study import Check, Figure, Row
from shoal.plan.over_links import rows_over_links
from shoal.plan.placement import Placement
from shoal.plan.rates import Rates
from shoal.plan.spec import Problem

STAGE_BLOCKS: Final = (4, 5, 6, 8, 10)
"""4 fill the half of a T4's memory that Helix leaves for weights; 8 would fill all of it."""


PUBLISHED_SHARES: Final = {"single cluster": 109 / 231, "three clusters": 42 / 98}
"""SWARM's tokens per second by Helix', both with Helix' scheduler."""


def swarm_stages(problem: Problem, size: int | None = None) -> Placement:
    """SWARM's placement, as Helix has it: equal stages of `size` blocks (default: what the
    smallest machine can hold); each machine, the fastest first, joins the stage with the fewest
    rows per second. For comparison only: nothing else in Shoal has stages."""
    if size is None:
        size = min(server.num_blocks_max or problem.num_blocks for server in problem.servers)
    stages = [
        Span(start, min(start + size, problem.num_blocks))
        for start in range(0, problem.num_blocks, size)
    ]
    rows = [0.0] * len(stages)
    spans: list[Span | None] = [None] * len(problem.servers)
    for server in sorted(range(len(spans)), key=lambda one: -problem.servers[one].rows_per_s):
        stage = min(range(len(stages)), key=rows.__getitem__)
        spans[server] = stages[stage]
        rows[stage] += problem.servers[server].rows_per_s / len(stages[stage])
    return Placement(spans=tuple(spans))


def stage_rows(settings: Mapping[str, Problem], best: Mapping[str, float]) -> list[Row]:
    """By setting and blocks of a stage: what gets through, as a share of our best placement.

    Machines hold whatever a stage has, beyond half of their memory too.
    """
    rows = []
    for setting, problem in settings.items():
        for size in STAGE_BLOCKS:
            placement = swarm_stages(problem, size)
            flow = rows_over_links(problem, placement, _unlimited(problem))
            rows.append(
                Row(
                    table="SWARM by blocks of a stage",
                    keys=(("setting", setting), ("blocks", str(size))),
                    figures=(
                        Figure(name="stages", value=-(-problem.num_blocks // size)),
                        Figure(name="swarm, rows/s", value=flow),
                        Figure(name="swarm by the best", value=flow / best[setting]),
                        Figure(
                            name="swarm by helix",
                            value=PUBLISHED_SHARES[setting],
                            origin="published",
                        ),
                    ),
                )
            )
    return rows


def stage_check(rows: Sequence[Row]) -> Check:
    """Where links do not limit, what was published lies between two sizes of stages."""
    setting = "single cluster"
    low, high = (
        next(row for row in rows if row.has(setting=setting, blocks=str(size)))
        for size in STAGE_BLOCKS[:2]
    )
    shares = [row.value("swarm by the best") for row in (low, high)]
    theirs = PUBLISHED_SHARES[setting]
    return Check(
        name=f"single cluster: SWARM by the best placement is {theirs:.2f} as by Helix', or that "
        f"lies between stages of {STAGE_BLOCKS[0]} and of {STAGE_BLOCKS[1]} blocks",
        found=" and ".join(f"{share:.2f}" for share in shares),
        holds=shares[0] <= theirs <= shares[1],
    )


def _unlimited(problem: Problem) -> Rates:
    """By server and number of blocks: rows per second, whatever fits."""
    return tuple(
        tuple(server.rows_per_s / count for count in range(1, problem.num_blocks + 1))
        for server in problem.servers
    )
