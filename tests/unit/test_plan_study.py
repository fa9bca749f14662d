"""A study in small: placing for latency against Petals' rule, as measured before.

80 blocks, servers scattered over 150 ms x 150 ms, push. Planned for 4 clients, judged on 12
others. The study found 1.2 times on average over 12 servers' seeds, and up to 1.4.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from shoal.base.errors import NoRouteError
from shoal.plan.bounds import request_bound_s
from shoal.plan.compose import mean_s, scorer
from shoal.plan.memory import CacheShape
from shoal.plan.place.cgbp import cgbp, choose_sessions
from shoal.plan.place.latency import Goal, choose_join, settle
from shoal.plan.place.petals import place_petals_joins
from shoal.plan.placement import Placement
from shoal.plan.spec import Links, Problem, Workload, uniform_model
from tests.unit.plan_problems import bloom, server

BLOCKS = 80
SIZES = ((5, 12), (10, 7), (20, 4), (40, 2))
"""Blocks of a server and milliseconds per block; the smaller the more frequent."""


def scattered(count: int, seed: int) -> tuple[Problem, Problem] | None:
    """The problem of the planning clients and that of the judging ones."""
    rng = random.Random(seed)
    servers, places, miles = [], [], []
    for _ in range(count):
        size, block_ms = rng.choices(SIZES, weights=(4, 3, 2, 1))[0]
        block_s = block_ms * rng.uniform(0.8, 1.3) / 1e3
        servers.append(server(10**15, block_s, num_blocks_max=size))
        places.append((rng.uniform(0, 150), rng.uniform(0, 150)))
        miles.append(rng.uniform(2, 15))
    if sum(one.num_blocks_max or 0 for one in servers) < 1.3 * BLOCKS:
        return None
    homes = [(rng.uniform(0, 150), rng.uniform(0, 150)) for _ in range(16)]

    def rtts(spot: tuple[float, float], mile: float) -> tuple[float, ...]:
        pairs = zip(places, miles, strict=True)
        return tuple((math.dist(spot, place) + mile + other) / 1e3 for place, other in pairs)

    between = tuple(rtts(place, mile) for place, mile in zip(places, miles, strict=True))
    near = [rtts(home, 5) for home in homes]
    both = [
        Problem(
            model=uniform_model(BLOCKS, 1000, CacheShape(values_per_token=1)),
            servers=tuple(servers),
            links=Links(
                client_rtt_s=tuple(rows), server_rtt_s=between, flow="push", handling_s=0.018
            ),
            workload=Workload(tokens_in=1, tokens_out=1, sessions=len(rows)),
        )
        for rows in (near[:4], near[4:])
    ]
    return both[0], both[1]


@pytest.mark.parametrize(("fast", "slow"), [(2, 7), (5, 21)])
def test_cgbp_is_optimal_on_the_published_testbeds(fast, slow):
    """BLOOM-176B on 2 or 5 A100s and 7 or 21 sevenths: 0.45 s per token and no hope of less.

    Our re-measurement of BPRR found 0.60 for Petals' placement on 26 servers, 0.45 for CG-BP.
    """
    rng = random.Random(3)
    raw = [rng.uniform(0.001, 0.03) for _ in range(fast + slow)]
    problem = bloom(fast, slow, raw, rate=0.5, tokens_out=128)
    sessions = choose_sessions(problem)
    problem = replace(problem, workload=replace(problem.workload, sessions=sessions))
    step_s = mean_s(problem, cgbp(problem, sessions))
    assert step_s == pytest.approx(request_bound_s(problem))
    assert step_s == pytest.approx(0.45, abs=0.01)
    petals = place_petals_joins(problem, random.Random(0))
    assert mean_s(problem, petals, sessions=1) > 1.2 * step_s


@pytest.mark.slow
def test_placing_for_latency_beats_petals_rule():
    gains = []
    for seed in range(6):
        found = scattered(12, seed)
        if found is None:
            continue
        planned, judged = found
        try:
            petals = place_petals_joins(planned, random.Random(seed))
        except NoRouteError:
            continue
        goal = Goal(score=scorer(planned), danger_s=0.005)
        order = random.Random(seed).sample(range(12), 12)
        placement = Placement(spans=(None,) * 12)
        for one in order:
            size = planned.servers[one].num_blocks_max or 0
            placement = placement.moved(one, choose_join(goal, placement, one, size))
        placement = settle(goal, placement, order)
        gains.append(mean_s(judged, replace(petals, cache_bytes=None)) / mean_s(judged, placement))
    assert len(gains) >= 4
    assert sum(gains) / len(gains) >= 1.1
    assert max(gains) >= 1.3
    assert min(gains) >= 0.97
