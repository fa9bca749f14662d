"""BPRR's testbed as a problem: BLOOM-176B on A100s and their sevenths, with its constants.

Source: Sun, He, Ji, Parag, BPRR (arXiv 2512.21884), calibration tables and released scripts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.lab.sim_result import Result
from shoal.lab.sim_scenario import Scenario, Waiting, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.plan.memory import mha, quantised_bytes
from shoal.plan.place.cgbp import amortised, cgbp, choose_sessions
from shoal.plan.place.petals import join_in_order, petals_blocks
from shoal.plan.placement import Placement, covering
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

NUM_BLOCKS: Final = 70
BLOCK_BYTES: Final = quantised_bytes(2_466_437_120, 4.25, 1.01)
TOKENS_IN: Final = 20
SETUP_S: Final = 0.07
"""Initial delay of each request."""

FAST: Final = ServerSpec(
    name="a100",
    memory_bytes=0,
    decode=DecodeTimes(points=((1, 0.0032197),)),
    prefill_s_per_block=0.03299,
    prefill_s_per_block_token=0.0000743,
    forward_rows_per_s=20829.4,
    network_rows_per_s=3020.4,
)
SLOW: Final = ServerSpec(
    name="mig",
    memory_bytes=0,
    decode=DecodeTimes(points=((1, 0.0162488),)),
    prefill_s_per_block=0.2063547,
    prefill_s_per_block_token=0.0001041,
    forward_rows_per_s=2757.7,
    network_rows_per_s=3138.1,
    num_blocks_max=4,
)

Memory = tuple[float, float]
"""GB that an A100 and a seventh can use; the scripts differ."""

MEMORY_9: Final[Memory] = (79.13, 8.2)
MEMORY_26: Final[Memory] = (84.973, 10.2)
MEMORY_SWEEPS: Final[Memory] = (86.13, 9.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a testbed."""

    requests_per_s: float
    tokens_out: int
    requests: int = 100

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """For a row."""
        return ("req/s", f"{self.requests_per_s:g}"), ("tokens", str(self.tokens_out))


LOADS: Final = ((0.1, 64), (0.1, 128), (0.5, 64), (0.5, 128))


def testbed(
    fast: Sequence[bool],
    client_rtt_s: Sequence[float],
    server_rtt_s: Sequence[Sequence[float]],
    load: Load,
    memory: Memory,
) -> Problem:
    """The testbed with one client, made for the published number of sessions R."""
    large, small = (
        replace(spec, memory_bytes=round(size * 1e9))
        for spec, size in zip((FAST, SLOW), memory, strict=True)
    )
    problem = Problem(
        model=uniform_model(NUM_BLOCKS, BLOCK_BYTES, mha(112, 128), hidden_size=14336),
        servers=tuple(large if one else small for one in fast),
        links=Links(
            client_rtt_s=(tuple(client_rtt_s),),
            server_rtt_s=tuple(map(tuple, server_rtt_s)),
            handling_s=0.1,
            prefill_handling_s=0.067,
            prefill_s_per_token=0.0007049,
        ),
        workload=Workload(
            tokens_in=TOKENS_IN, tokens_out=load.tokens_out, requests_per_s=load.requests_per_s
        ),
    )
    sessions = choose_sessions(problem)
    return replace(problem, workload=replace(problem.workload, sessions=sessions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A placement with a rule of routing."""

    name: str
    router: str
    waiting: Waiting = "back-off"


METHODS: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        Method(name="petals", router="petals"),
        Method(name="better routing", router="wsrr"),
        Method(name="better counts", router="petals"),
        Method(name="better order", router="petals"),
        Method(name="cgbp, blind", router="shortest"),
        Method(name="proposed", router="wsrr"),
    )
}
"""Petals, the paper's three halves of its proposal, its placement with routes that see no queue,
and the proposal: CG-BP with WS-RR."""


def placed(problem: Problem, method: str, seed: int) -> Placement:
    """Where a method puts the servers.

    Raises:
        NoRouteError: it leaves blocks uncovered.
    """
    sessions = problem.workload.sessions
    if method in ("cgbp, blind", "proposed"):
        return covering(problem, cgbp(problem, sessions))
    count = len(problem.servers)
    order = random.Random(f"joins {seed}").sample(range(count), count)
    sizes = [petals_blocks(problem, server) for server in range(count)]
    ranked = amortised(problem, sessions)
    if method == "better order":
        order = [one.server for one in ranked]
    if method == "better counts":
        # Counts that leave room for the sessions, and that room is used: no fixed cache.
        sizes = [0] * count
        for one in ranked:
            sizes[one.server] = one.num_blocks
        return covering(problem, replace(join_in_order(problem, order, sizes), cache_bytes=None))
    return covering(problem, join_in_order(problem, order, sizes))


def run_method(problem: Problem, method: str, load: Load, seed: int) -> Result:
    """One run at fidelity B.

    Raises:
        NoRouteError: the method leaves blocks uncovered.
    """
    rng = random.Random(f"requests {seed}")
    arrivals = poisson(rng, load.requests_per_s)
    rules = METHODS[method]
    return simulate_slots(
        Scenario(
            problem=problem,
            requests=draw_requests(problem, arrivals, load.requests, rng),
            placement=placed(problem, method, seed),
            router=rules.router,
            waiting=rules.waiting,
            setup_s=SETUP_S,
            seed=seed,
        )
    )


def run_all(
    problem: Problem, methods: Sequence[str], load: Load, seed: int
) -> dict[str, dict[str, float]] | None:
    """The summaries of some methods on one case; None where one of them can't cover the model."""
    try:
        return {name: run_method(problem, name, load, seed).summary() for name in methods}
    except NoRouteError:
        return None
