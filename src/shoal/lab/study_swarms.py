"""Swarms scattered over a square, for studies of placement for latency.

Ours, after what is known of Borisov's (master thesis, HSE 2024): 80 blocks, servers and clients
at random places of 150 ms x 150 ms, servers send to each other, the larger ones are the faster
and the rarer. Planned for 4 clients, judged by 12 others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.plan.memory import CacheShape
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

NUM_BLOCKS: Final = 80
KINDS: Final = ((5, 12.0), (10, 7.0), (20, 4.0), (40, 2.0))
"""Blocks of a server and its milliseconds per block; the smaller the more frequent."""

WEIGHTS: Final = (4, 3, 2, 1)
SIDE_MS: Final = 150.0
LAST_MILE_MS: Final = (2.0, 15.0)
CLIENT_MILE_MS: Final = 5.0
HANDLING_S: Final = 0.018
PLANNING, JUDGING = 4, 12
"""Clients that a swarm is planned for, and others that judge it."""

BLOCK_BYTES: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """The same servers, as planned for and as judged."""

    planned: Problem
    judged: Problem


def scattered_swarm(count: int, seed: int) -> Swarm:
    """Servers and clients at random places."""
    rng = random.Random(f"swarm {seed}")
    servers, spots, miles = [], [], []
    for number in range(count):
        size, block_ms = rng.choices(KINDS, weights=WEIGHTS)[0]
        servers.append(_server(f"s{number}", size, block_ms * rng.uniform(0.8, 1.3) / 1e3))
        spots.append((rng.uniform(0, SIDE_MS), rng.uniform(0, SIDE_MS)))
        miles.append(rng.uniform(*LAST_MILE_MS))
    homes = [(rng.uniform(0, SIDE_MS), rng.uniform(0, SIDE_MS)) for _ in range(PLANNING + JUDGING)]

    def rtts(spot: tuple[float, float], mile: float) -> tuple[float, ...]:
        pairs = zip(spots, miles, strict=True)
        return tuple((math.dist(spot, other) + mile + end) / 1e3 for other, end in pairs)

    between_s = tuple(rtts(spot, mile) for spot, mile in zip(spots, miles, strict=True))
    near = [rtts(home, CLIENT_MILE_MS) for home in homes]

    def problem(rows: Sequence[tuple[float, ...]]) -> Problem:
        # One token in and one out: a request is one decode step, the unit of this study.
        return Problem(
            model=uniform_model(NUM_BLOCKS, BLOCK_BYTES, CacheShape(values_per_token=0)),
            servers=tuple(servers),
            links=Links(
                client_rtt_s=tuple(rows), server_rtt_s=between_s, flow="push",
                handling_s=HANDLING_S, prefill_handling_s=HANDLING_S,
            ),
            workload=Workload(tokens_in=1, tokens_out=1, sessions=len(rows)),
        )  # fmt: skip

    return Swarm(planned=problem(near[:PLANNING]), judged=problem(near[PLANNING:]))


def _server(name: str, size: int, block_s: float) -> ServerSpec:
    return ServerSpec(
        name=name,
        memory_bytes=10**15,
        decode=DecodeTimes(points=((1, block_s),)),
        prefill_s_per_block=block_s,
        forward_rows_per_s=1 / block_s,
        num_blocks_max=size,
    )
