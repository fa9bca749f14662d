"""A gateway before a swarm: does each request find its own way, or does a dispatcher choose?

The real client, servers and dispatcher on virtual time with blocks that take modelled time,
so the figures are simulated. Both ways answer the same requests on the same swarm: servers of
three speeds at known round trips, larger batches take longer, memory for some dozens of sessions
each. Load is given as a share of what the chains pass when all seats are taken.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from report import RESULTS, environment, publish
from shoal.base.spans import Span
from shoal.lab.campaign import quiet
from shoal.lab.sim_live import DISPATCHED, simulate_live
from shoal.lab.sim_result import Result
from shoal.lab.sim_scenario import Scenario, draw_requests, poisson
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

BLOCKS: Final = 32
TOKENS_IN, TOKENS_OUT = 128, 64
SEATS: Final = 48
RATES: Final = (0.2, 1.0, 2.0, 3.0)
"""Requests per second."""
KINDS: Final = ((0.002, 16), (0.004, 16), (0.008, 8))
"""Seconds per block and row, blocks."""


def swarm(rng: random.Random, rate: float, servers: int) -> tuple[Problem, Placement]:
    """So many servers, each kind over all blocks in turn, near and far."""
    spans: list[Span] = []
    specs: list[ServerSpec] = []
    session = BLOCKS * (TOKENS_IN + TOKENS_OUT) * 2 * 4 * 64 * 2
    at, kind = 0, 0
    while len(specs) < servers or at:
        if not at:
            kind = (len(spans) // 2) % len(KINDS)
        tau_s, count = KINDS[kind]
        points = tuple((batch, tau_s * (0.7 + 0.3 * batch)) for batch in (1, 4, 16, 64))
        specs.append(
            ServerSpec(
                name=f"server {len(specs)}",
                memory_bytes=10**6 * count + SEATS * session * count // BLOCKS,
                decode=DecodeTimes(points=points),
                prefill_s_per_block=tau_s,
                prefill_s_per_block_token=tau_s / 16,
            )
        )
        spans.append(Span(at, at + count))
        at = (at + count) % BLOCKS
    clients = tuple(rng.uniform(0.005, 0.08) for _ in specs)
    between = tuple(tuple(abs(a - b) + 0.005 for b in clients) for a in clients)
    problem = Problem(
        model=uniform_model(
            BLOCKS, 10**6, gqa(4, 64), hidden_size=256, row_bytes=512, keeps_logs=False
        ),
        servers=tuple(specs),
        links=Links(client_rtt_s=(clients,), server_rtt_s=between, flow="push", handling_s=0.001),
        workload=Workload(tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, requests_per_s=rate),
    )
    return problem, Placement(spans=tuple(spans))


def figures(results: list[Result]) -> dict[str, Any]:
    """Of all rounds together."""
    served = [one for result in results for one in result.served]
    times = sorted(one.end_s - one.at_s for one in served if not one.error)
    waits = [one.start_s - one.at_s for one in served if not one.error]
    return {
        "mean response s": round(sum(times) / len(times), 2),
        "p95 s": round(times[len(times) * 95 // 100], 2),
        "mean wait s": round(sum(waits) / len(waits), 2),
        "failed": len(served) - len(times),
    }


def main() -> None:
    """Each load, both ways in turn, over some seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rate in options.rates:
        found: dict[str, list[Result]] = {"each for itself": [], "dispatcher": []}
        for seed in range(100, 100 + options.seeds):
            rng = random.Random(seed)
            problem, placement = swarm(rng, rate, options.servers)
            requests = draw_requests(problem, poisson(rng, rate), options.requests, rng)
            scenario = Scenario(problem=problem, requests=requests, placement=placement, seed=seed)
            for way, results in found.items():
                router = DISPATCHED if way == "dispatcher" else "wsrr"
                with quiet():
                    results.append(simulate_live(replace(scenario, router=router)))
        for way, results in found.items():
            rows.append({"requests per s": rate, "way": way} | figures(results))
            print(rows[-1], flush=True)
    facts = environment() | {"servers": options.servers, "simulated": True}
    publish("dispatch", rows, facts, folder=options.out, source="simulated")


if __name__ == "__main__":
    main()
