"""Two servers that compute: what one process says of their blocks, and the real chain."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any, Final

from engines import Runner
from model_servers import Server, connected, random_rows, workers_of
from random_model import SHAPES, random_source
from rounds import ROUNDS_PER_WANTED, Round, Rounds, read_accounts, usage_between
from shoal.base.spans import Span
from shoal.client.client import Client
from shoal.lab.sim_result import Result, Served
from shoal.lab.sim_scenario import Request, Scenario
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

TOKENS_IN: Final = 96
TOKENS_OUT: Final = 32
BATCHES: Final = (1, 2, 4, 8)
PROMPTS: Final = (16, 96)
STEPS: Final = 24
LOOPBACK_RTT_S: Final = 1e-4
ROUNDS_S: Final = 60.0
"""No round of a case is begun after this."""


BlockTimes = tuple[DecodeTimes, float, float]
"""Decode by batch; prefill fixed and per row: seconds of one block."""


def real_case(shape: str, sessions: int, handling_s: float, times: BlockTimes) -> Scenario:
    """So many sessions at once through two servers, with block times measured just now."""
    blocks = int(SHAPES[shape]["num_hidden_layers"])
    spans = (Span(0, blocks // 2), Span(blocks // 2, blocks))
    decode, fixed_s, row_s = times
    hidden = int(SHAPES[shape]["hidden_size"])
    servers = tuple(
        ServerSpec(
            name=f"server {index}",
            memory_bytes=10**12,
            decode=decode,
            prefill_s_per_block=fixed_s,
            prefill_s_per_block_token=row_s,
        )
        for index in range(2)
    )
    rtts = (LOOPBACK_RTT_S,) * 2
    problem = Problem(
        model=uniform_model(blocks, 10**6, gqa(4, 64), hidden_size=hidden, row_bytes=2 * hidden),
        servers=servers,
        links=Links(
            client_rtt_s=(rtts,), server_rtt_s=(rtts, rtts), flow="push",
            handling_s=handling_s, prefill_handling_s=handling_s,
        ),
        workload=Workload(tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, sessions=sessions),
    )  # fmt: skip
    request = Request(at_s=0.0, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT)
    return Scenario(
        problem=problem,
        requests=(request,) * sessions,
        placement=Placement(spans=spans),
        router="shortest",
    )


def block_times(shape: str) -> BlockTimes:
    """Measured on half of the blocks, one process, one thread."""
    blocks = int(SHAPES[shape]["num_hidden_layers"]) // 2
    config = BackendConfig(model=shape, dtype="bfloat16")
    source = random_source(SHAPES[shape], blocks)
    runner = Runner(load_backend(source, Span(0, blocks), config))
    points, prompts = [], []
    with asyncio.Runner() as loop:
        for batch in BATCHES:
            runner.open(batch)
            for number in range(batch):
                runner.step_s(loop, [(number, TOKENS_IN)])
            work = [(number, 1) for number in range(batch)]
            taken = [runner.step_s(loop, work) for _ in range(STEPS)]
            points.append((batch, min(taken) / blocks))
        for rows in PROMPTS:
            taken = []
            for _ in range(STEPS // 2):
                runner.open(1)
                taken.append(runner.step_s(loop, [(0, rows)]))
            prompts.append(min(taken) / blocks)
    row_s = max(0.0, (prompts[1] - prompts[0]) / (PROMPTS[1] - PROMPTS[0]))
    fixed_s = max(0.0, prompts[0] - row_s * PROMPTS[0])
    return DecodeTimes(points=tuple(points)), fixed_s, row_s


def real_measured(
    shape: str, servers: Sequence[Server], scenario: Scenario, wanted: int
) -> tuple[dict[str, float] | None, list[dict[str, Any]]]:
    """The same sessions on server processes with random weights.

    The round with the median response of those in which everybody had its core (None: there
    was none), and all rounds.
    """
    rounds = asyncio.run(_rounds(shape, servers, scenario, wanted))
    kept = [(result, one) for result, one in rounds if not one.is_disturbed]
    kept.sort(key=lambda pair: pair[1].value)
    details = Rounds(taken=[one for _, one in rounds]).details()
    return (kept[len(kept) // 2][0].summary() if kept else None), details


async def _rounds(
    shape: str, servers: Sequence[Server], scenario: Scenario, wanted: int
) -> list[tuple[Result, Round]]:
    workers = {**workers_of(servers), "client": os.getpid()}
    found: list[tuple[Result, Round]] = []
    async with connected(shape, servers) as client:
        for _ in range(2):  # links are up, caches of the allocator are warm
            await _session(client, shape)
        end_s = time.perf_counter() + ROUNDS_S
        for _ in range(wanted * ROUNDS_PER_WANTED):
            if time.perf_counter() > end_s:
                break
            before, zero_s = read_accounts(), time.perf_counter()
            sessions = [_session(client, shape, zero_s) for _ in scenario.requests]
            result = Result(
                fidelity="measured", seed=0, served=tuple(await asyncio.gather(*sessions)),
                placement=Placement(spans=(None, None)),
            )  # fmt: skip
            after = read_accounts()
            usage = usage_between(before, after, workers) if before and after else None
            mean_s = result.summary()["response_s_mean"]
            found.append((result, Round(value=mean_s, usage=usage)))
            if sum(not one.is_disturbed for _, one in found) == wanted:
                break
    return found


async def _session(client: Client, shape: str, zero_s: float = 0.0) -> Served:
    prompt, row = random_rows(shape, TOKENS_IN), random_rows(shape, 1)
    async with await client.open_session("bfloat16") as session:
        start_s = time.perf_counter()
        await session.step(prompt, TOKENS_IN)
        first_s = time.perf_counter()
        for _ in range(TOKENS_OUT - 1):
            await session.step(row, 1)
        end_s = time.perf_counter()
    return Served(
        client=0, at_s=0.0, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT,
        start_s=start_s - zero_s, first_s=first_s - zero_s, end_s=end_s - zero_s,
    )  # fmt: skip
