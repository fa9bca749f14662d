"""Placements for throughput: Helix' 24 machines with LLaMA-70B, against Petals' rule.

Source: Mei et al., Helix (ASPLOS'25, arXiv 2406.01566): tokens per second of its placement,
Petals' and SWARM's, all under its scheduler. Here rates are a line through its profiles, and the
rows per second that a placement lets through are computed, not simulated. First its single
cluster, in which links do not limit, then its three (`study_helix_links`).
"""

from __future__ import annotations

import random
from typing import Final

from shoal.lab.study import Chart, Figure, Report, Row, Task, between, mean, within
from shoal.lab.study_helix_links import LINK_NOTES, geographic
from shoal.plan.bounds import throughput_bound
from shoal.plan.memory import gqa
from shoal.plan.place.flow import plan_flow
from shoal.plan.place.petals import place_petals, place_petals_joins
from shoal.plan.rates import Rates, rows_through
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

NUM_BLOCKS: Final = 80
MACHINES: Final = (("A100", 4, 12, 6400.0), ("L4", 8, 7, 1400.0), ("T4", 12, 4, 800.0))
"""Name, how many, blocks that fit into half of the memory, rows per second through one block."""

PUBLISHED: Final = {"helix": 231.0, "petals": 195.0, "swarm": 109.0}
"""Decode tokens per second by placement in the single cluster, all with Helix' scheduler."""

BRANCHES_MAX: Final = 2_000
"""Of the search tree, each of two times: some 10 s, and the same on any machine."""

BOUND: Final = 580.0
"""Rows per second that no placement of these machines exceeds, from an earlier study of ours."""


def machines() -> Problem:
    """The 24 machines, near each other."""
    servers = [
        ServerSpec(
            name=f"{name}-{number}",
            memory_bytes=10**15,
            decode=DecodeTimes(points=((1, 1 / rate),)),
            forward_rows_per_s=rate,
            num_blocks_max=most,
        )
        for name, count, most, rate in MACHINES
        for number in range(count)
    ]
    return Problem(
        model=uniform_model(NUM_BLOCKS, 10**9, gqa(8, 128), hidden_size=8192, row_bytes=16384),
        servers=tuple(servers),
        links=Links(client_rtt_s=((0.001,) * len(servers),)),
        workload=Workload(tokens_in=763, tokens_out=232),
    )


def rates_of(problem: Problem) -> Rates:
    """By server and number of blocks: rows per second through all of them."""
    return tuple(
        tuple(
            server.rows_per_s / count if count <= (server.num_blocks_max or 0) else 0.0
            for count in range(1, NUM_BLOCKS + 1)
        )
        for server in problem.servers
    )


def helix(task: Task) -> Report:
    """The flow through placements by our rule, by Petals', and what nothing can beat."""
    problem = machines()
    rates = rates_of(problem)
    bound = throughput_bound(problem, rates)
    planned = plan_flow(
        problem,
        rates=rates,
        limit_s=None,
        branches_max=BRANCHES_MAX // (20 if task.is_quick else 1),
    )
    ours = planned.rows_per_s
    joined, settled = [], []
    for seed in task.told("Petals, seed", range(task.seeds)):
        joins = place_petals_joins(problem, random.Random(seed))
        moves = place_petals(problem, random.Random(seed))
        joined.append(rows_through(problem, joins, rates))
        settled.append(rows_through(problem, moves, rates))
    figures = [
        Figure(name=f"{name}, tokens/s", value=value, origin="published")
        for name, value in PUBLISHED.items()
    ]
    petals = mean(settled)
    figures += [
        Figure(
            name="petals by helix",
            value=PUBLISHED["petals"] / PUBLISHED["helix"],
            origin="published",
        ),
        Figure(name="bound, rows/s", value=bound),
        Figure(name="flow, rows/s", value=ours),
        Figure(name="petals, rows/s", value=petals),
        Figure(name="petals without moves, rows/s", value=mean(joined)),
        Figure(name="petals by flow", value=petals / ours),
    ]
    row = Row(table="rows per second", keys=(("machines", "24"),), figures=tuple(figures))
    chart = Chart(
        table="rows per second",
        figures=("bound, rows/s", "flow, rows/s", "petals, rows/s", "petals without moves, rows/s"),
        label="rows per second",
    )
    rows, checks = geographic(task, problem, rates, planned.placement)
    return Report(
        rows=(row, *rows),
        checks=(
            within("the analytic bound as computed before", bound, BOUND, 0.1),
            between("our placement for throughput by the bound", ours / bound, 0.8, 1.0),
            within("Petals' placement by ours, as by Helix'", petals / ours, 195 / 231, 0.1),
            *checks,
        ),
        charts=(chart, LINK_CHART),
        notes=(*NOTES, *LINK_NOTES),
    )


LINK_CHART: Final = Chart(
    table="links that limit",
    figures=tuple(
        f"{name}, rows/s"
        for name in ("annealed on links", "flow, which knows no links", "petals", "swarm")
    ),
    label="rows per second",
)

NOTES: Final = (
    "Published tokens per second are of whole runs with batches, caches and prompts; ours are what "
    "servers let through. Only shares can be compared.",
    "`flow` leaves links out; the second table shows what that costs where they limit.",
)
