"""Helix' geographic setting: rows per second when links between clusters limit, too.

The same 24 machines in three clusters. What a placement lets through is a maximum flow: machines
share their time between runs of blocks, links pass so many rows. Ours is annealed on that flow,
from the placement that knows no links; Petals' and SWARM's rules know none either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from shoal.lab.study import Check, Figure, Row, Task, falling, mean
from shoal.lab.study_helix_stages import stage_check, stage_rows, swarm_stages
from shoal.plan.over_links import link_scorer, rows_over_links
from shoal.plan.place.anneal import place_anneal
from shoal.plan.place.petals import place_petals
from shoal.plan.placement import Placement
from shoal.plan.rates import Rates
from shoal.plan.spec import Links, Problem

CLUSTERS: Final = (0,) * 4 + (1,) * 2 + (2,) * 6 + (1,) * 8 + (2,) * 4
"""Of the machines in their order: all A100s; 2 L4 and 8 T4; 6 L4 and 4 T4."""

INSIDE_BYTES_PER_S, BETWEEN_BYTES_PER_S = 1.25e9 / 8, 12.5e6 / 8
"""Of each pair of machines: 1.25 Gbit/s, and 12.5 Mbit/s between clusters."""

MOVES: Final = 4000
DRAWS: Final = 4
"""Of the annealer; the best counts."""

PUBLISHED: Final = {"helix": 98.0, "petals": 67.0, "swarm": 42.0}
"""Decode tokens per second by placement in the geographic setting, all with Helix' scheduler."""


def with_links(problem: Problem, clusters: Sequence[int]) -> Problem:
    """The machines with the ways between them; who hosts what knows no delays here."""
    count = len(problem.servers)
    links = Links(
        client_rtt_s=problem.links.client_rtt_s,
        server_rtt_s=((0.0,) * count,) * count,
        server_bytes_per_s=tuple(
            tuple(INSIDE_BYTES_PER_S if one == other else BETWEEN_BYTES_PER_S for other in clusters)
            for one in clusters
        ),
        flow="push",
    )
    return replace(problem, links=links)


def annealed(problem: Problem, rates: Rates, start: Placement, seed: int, moves: int) -> Placement:
    """A placement for the flow over links."""
    score = link_scorer(problem, rates)
    return place_anneal(problem, random.Random(seed), score=score, start=start, moves=moves)


def geographic(
    task: Task, problem: Problem, rates: Rates, linkless: Placement
) -> tuple[list[Row], list[Check]]:
    """The flow of each placement, with links that limit and without."""
    linked = with_links(problem, CLUSTERS)
    settings = {"single cluster": problem, "three clusters": linked}
    moves, draws = (MOVES // 10, 1) if task.is_quick else (MOVES, DRAWS)
    ours = max(
        (
            annealed(linked, rates, linkless, seed, moves)
            for seed in task.told("ours", range(draws))
        ),
        key=lambda placement: rows_over_links(linked, placement, rates),
    )
    petals = [place_petals(problem, random.Random(seed)) for seed in range(task.seeds)]
    placements = {
        "annealed on links": [ours],
        "flow, which knows no links": [linkless],
        "petals": petals,
        "swarm": [swarm_stages(problem)],
    }
    rows, bests = [], {}
    for setting, one_setting in settings.items():
        flows = {
            name: mean([rows_over_links(one_setting, one, rates) for one in own])
            for name, own in placements.items()
        }
        best = max(flows.values())
        figures = [Figure(name=f"{name}, rows/s", value=value) for name, value in flows.items()]
        figures += [
            Figure(name=f"{name} by the best", value=flows[name] / best)
            for name in ("petals", "swarm")
        ]
        if one_setting is linked:
            figures += [
                Figure(name=f"{name}, tokens/s", value=value, origin="published")
                for name, value in PUBLISHED.items()
            ]
            figures += [
                Figure(
                    name=f"{name} by helix",
                    value=PUBLISHED[name] / PUBLISHED["helix"],
                    origin="published",
                )
                for name in ("petals", "swarm")
            ]
        rows.append(
            Row(table="links that limit", keys=(("setting", setting),), figures=tuple(figures))
        )
        bests[setting] = best
    stages = stage_rows(settings, bests)
    return [*rows, *stages], [*_checks(rows[-1]), stage_check(stages)]


def _checks(row: Row) -> list[Check]:
    checks = [
        falling(
            "three clusters: annealed on links > flow > Petals > SWARM",
            [
                row.value(f"{name}, rows/s")
                for name in ("annealed on links", "flow, which knows no links", "petals", "swarm")
            ],
        )
    ]
    for name in ("petals", "swarm"):
        share, most = row.value(f"{name} by the best"), PUBLISHED[name] / PUBLISHED["helix"]
        checks.append(
            Check(
                name=f"three clusters: {name} by the best placement is {most:.2f} as by Helix' "
                "(+10 %), or less where ours is better",
                found=f"{share:.2f}",
                holds=share <= 1.1 * most,
            )
        )
    return checks


LINK_NOTES: Final = (
    "Three clusters: 12.5 Mbit/s from any machine to any other between them, 1.25 Gbit/s inside; "
    "which machines are where is known to us at second hand. Flows are computed, as Helix plans "
    "with them; published are whole runs. Delays cost throughput nothing here.",
    "SWARM's rule, as Helix tells of it: 20 stages of the 4 blocks that a T4 holds in half of its "
    "memory, so a single T4 limits many of them. With one block more there are 16 stages, and no "
    "T4 is alone in one: the last table shows how much hangs on that. How many stages Helix' SWARM "
    "has is not known to us.",
)
