"""Problems and scenarios for the tests of simulations: small swarms, known by heart."""

from __future__ import annotations

from typing import Any

from shoal.base.spans import Span
from shoal.lab.sim_scenario import Request, Scenario
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.spec import (
    DecodeTimes,
    Flow,
    Links,
    ModelSpec,
    Problem,
    ServerSpec,
    Workload,
    uniform_model,
)

TOKENS_IN, TOKENS_OUT = 64, 16

MODEL: ModelSpec = uniform_model(
    12, 10**9, gqa(8, 128), hidden_size=1024, row_bytes=2048, keeps_logs=True
)


def swarm(
    count: int = 3, *, flow: Flow = "push", clients: int = 1, seats: int = 8, rate: float = 1.0
) -> Problem:
    """Servers for 4 of 12 blocks each and `seats` sessions; the later the farther."""
    session = 4 * (TOKENS_IN + TOKENS_OUT) * 2 * 8 * 128 * 2 + (TOKENS_IN + TOKENS_OUT) * 2048
    servers = tuple(
        ServerSpec(
            name=f"s{index}",
            memory_bytes=4 * 10**9 + seats * session,
            decode=DecodeTimes(points=((1, 0.003), (8, 0.004))),
            prefill_s_per_block_token=0.0002,
            link_bytes_per_s=125e6,
            num_blocks_max=4,
        )
        for index in range(count)
    )
    rtts = tuple(0.02 + 0.01 * index for index in range(count))
    between = tuple(
        tuple(0.0 if one == other else 0.03 for other in range(count)) for one in range(count)
    )
    return Problem(
        model=MODEL,
        servers=servers,
        links=Links(
            client_rtt_s=(rtts,) * clients,
            server_rtt_s=between,
            flow=flow,
            handling_s=0.001,
            prefill_handling_s=0.001,
        ),
        workload=Workload(
            tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, requests_per_s=rate, sessions=4
        ),
    )


THIRDS = (Span(0, 4), Span(4, 8), Span(8, 12))


def scenario(problem: Problem, *times_s: float, **more: Any) -> Scenario:
    """Requests of the workload's lengths at these times; the first three servers in a row."""
    spans = THIRDS + (None,) * (len(problem.servers) - 3)
    options: dict[str, Any] = {"placement": Placement(spans=spans), "router": "shortest"} | more
    requests = tuple(
        Request(at_s=at_s, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT) for at_s in times_s
    )
    return Scenario(problem=problem, requests=requests, **options)
