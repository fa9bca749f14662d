"""Settings of published work for `plan.py`: BLOOM-176B on A100s and their sevenths, tight memory.

Constants are those of BPRR (arXiv 2512.21884) without the ones fitted to a testbed. Its maps of
networks have delays faster than light; so places are cities here, and cables are 1.5 times as long
as the great circle.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from shoal.lab import study_bloom
from shoal.plan.distance import Position, fibre_rtt_s
from shoal.plan.memory import CacheShape, mha
from shoal.plan.place.cgbp import choose_sessions
from shoal.plan.spec import (
    DecodeTimes,
    Links,
    Problem,
    ServerSpec,
    Workload,
    uniform_model,
)

FAST: Final = replace(study_bloom.FAST, memory_bytes=86_130_000_000)
SLOW: Final = replace(study_bloom.SLOW, memory_bytes=9_100_000_000)

REGIONS: Final = {
    "us and europe": [
        (37.3, -121.9), (47.6, -122.3), (34.1, -118.2), (33.4, -112.1), (32.8, -96.8),
        (29.8, -95.4), (39.7, -105.0), (41.9, -87.6), (38.9, -77.0), (40.7, -74.0),
        (42.4, -71.1), (33.7, -84.4), (25.8, -80.2), (51.5, -0.1), (52.4, 4.9),
        (50.1, 8.7), (48.9, 2.4),
    ],
    "canada": [
        (49.3, -123.1), (51.0, -114.1), (53.5, -113.5), (50.4, -104.6), (52.1, -106.7),
        (49.9, -97.1), (48.4, -89.2), (46.5, -84.3), (43.7, -79.4), (45.4, -75.7),
        (45.5, -73.6), (46.8, -71.2), (45.9, -66.6), (44.6, -63.6), (47.6, -52.7),
        (43.0, -81.2),
    ],
    "central europe": [
        (50.1, 14.4), (48.1, 17.1), (48.2, 16.4), (47.5, 19.0), (52.2, 21.0),
        (50.1, 19.9), (52.5, 13.4), (48.1, 11.6), (50.1, 8.7), (47.4, 8.5),
        (45.8, 16.0), (46.1, 14.5), (44.4, 26.1), (42.7, 23.3), (51.1, 17.0),
        (49.2, 16.6), (53.6, 10.0), (45.5, 9.2),
    ],
}  # fmt: skip
"""Cities in degrees; several servers may be in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Servers somewhere, and a load."""

    region: str
    fast: int
    slow: int
    rate: float
    tokens_out: int
    is_scarce: bool = False

    @property
    def name(self) -> str:
        return f"{self.region}, {self.fast} + {self.slow}"


def settings() -> list[Setting]:
    """9 servers in the US and Europe, 19 and 26 in Canada, 20 and 60 in central Europe."""
    loads = ((0.1, 64), (0.1, 128), (0.5, 64), (0.5, 128))
    scarce = [("us and europe", 2, 7), ("canada", 2, 17), ("central europe", 2, 18)]
    rich = [("canada", 5, 21), ("central europe", 12, 48)]
    return [
        Setting(
            region=region, fast=fast, slow=slow, rate=rate, tokens_out=tokens, is_scarce=is_scarce
        )
        for swarms, is_scarce in ((scarce, True), (rich, False))
        for region, fast, slow in swarms
        for rate, tokens in loads
    ]


def drawn(setting: Setting, seed: int) -> Problem:
    """The setting with places drawn; one client, 20 tokens in, the relay is the client."""
    rng = random.Random(seed)
    cities = [Position(*city) for city in REGIONS[setting.region]]
    count = setting.fast + setting.slow
    client, *spots = (rng.choice(cities) for _ in range(count + 1))
    servers = [FAST] * setting.fast + [SLOW] * setting.slow
    rng.shuffle(servers)
    problem = Problem(
        model=uniform_model(70, study_bloom.BLOCK_BYTES, mha(112, 128), hidden_size=14336),
        servers=tuple(servers),
        links=Links(
            client_rtt_s=(tuple(fibre_rtt_s(client, spot) for spot in spots),),
            server_rtt_s=tuple(tuple(fibre_rtt_s(one, spot) for spot in spots) for one in spots),
            handling_s=0.1,
            prefill_handling_s=0.067,
            prefill_s_per_token=0.0007049,
        ),
        workload=Workload(tokens_in=20, tokens_out=setting.tokens_out, requests_per_s=setting.rate),
    )
    sessions = choose_sessions(problem)
    return replace(problem, workload=replace(problem.workload, sessions=sessions))


def tight(servers: int, blocks: int, sessions: int, slack: float, seed: int) -> Problem:
    """Memory of `slack` times what the sessions need, unevenly shared; decode steps only."""
    rng = random.Random(seed)
    is_far = rng.random() < 0.5
    fast = [rng.random() < 0.3 for _ in range(servers)]
    shares = [(3 if one else 1) * rng.uniform(0.7, 1.3) for one in fast]
    whole = blocks * (1 + 0.12 * sessions) * slack * 10**9
    times = [(3.2 if one else 16.2) * rng.uniform(0.8, 1.25) / 1e3 for one in fast]
    rtts = [(rng.uniform(80, 200) if is_far else rng.uniform(5, 30)) / 1e3 + 0.02 for _ in fast]
    return plain(
        [int(share / sum(shares) * whole) for share in shares], times, rtts, blocks, sessions
    )


def roomy(servers: int, blocks: int, sessions: int, seed: int) -> Problem:
    """The instances on which exact programs were compared: fast ones hold 0.6 of a model."""
    rng = random.Random(seed)
    fast = [rng.random() < 0.35 for _ in range(servers)]
    memory = [
        int(1.337e9 * blocks * (0.6 if one else 0.22) + 0.15 * 34e6 * sessions * blocks)
        for one in fast
    ]
    times = [0.0032 if one else 0.0162 for one in fast]
    rtts = [rng.uniform(0.11, 0.22) for _ in fast]
    return plain(memory, times, rtts, blocks, sessions, weight=1_337_000_000, cache=34_000_000)


def plain(
    memory: list[int],
    times_s: list[float],
    rtts_s: list[float],
    blocks: int,
    sessions: int,
    *,
    weight: int = 10**9,
    cache: int = 12 * 10**7,
) -> Problem:
    """Equal blocks, one client, prices by way of it."""
    shape = CacheShape(values_per_token=0, state_bytes=cache)
    return Problem(
        model=uniform_model(blocks, weight, shape),
        servers=tuple(
            ServerSpec(name="s", memory_bytes=size, decode=DecodeTimes(points=((1, time_s),)))
            for size, time_s in zip(memory, times_s, strict=True)
        ),
        links=Links(client_rtt_s=(tuple(rtts_s),)),
        workload=Workload(tokens_in=1, tokens_out=1, sessions=sessions),
    )
