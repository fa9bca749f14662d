"""Two servers that compute: what one process says of their blocks, and the real chain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from calibration_blocks import BlockMeter, BlockTimes, Sample, block_times, halves
from model_servers import Server, connected, random_rows, workers_of
from random_model import SHAPES
from rounds import ROUNDS_PER_WANTED, Round, Rounds, read_accounts, usage_between
from shoal.client.client import Client
from shoal.lab.sim_analytic import simulate_analytic
from shoal.lab.sim_result import Result, Served
from shoal.lab.sim_scenario import Request, Scenario
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.spec import Links, Problem, ServerSpec, Workload, uniform_model

TOKENS_IN: Final = 96
TOKENS_OUT: Final = 32
LOOPBACK_RTT_S: Final = 1e-4
ROUNDS_S: Final = 60.0
"""No turn is begun after this."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """What a hop costs beside its blocks."""

    decode_s: float = 0.0
    prefill_s: float = 0.0


def real_case(shape: str, sessions: int, handling: Handling, times: BlockTimes) -> Scenario:
    """So many sessions at once through two servers, with block times measured just now."""
    spans = halves(shape)
    blocks, hidden = spans[-1].end, int(SHAPES[shape]["hidden_size"])
    servers = tuple(
        ServerSpec(
            name=f"server {index}",
            memory_bytes=10**12,
            decode=times.decode[index],
            prefill_s_per_block=times.prefill_fixed_s[index],
            prefill_s_per_block_token=times.prefill_row_s[index],
        )
        for index in range(len(spans))
    )
    rtts = (LOOPBACK_RTT_S,) * 2
    problem = Problem(
        model=uniform_model(blocks, 10**6, gqa(4, 64), hidden_size=hidden, row_bytes=2 * hidden),
        servers=servers,
        links=Links(
            client_rtt_s=(rtts,), server_rtt_s=(rtts, rtts), flow="push",
            handling_s=handling.decode_s, prefill_handling_s=handling.prefill_s,
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


def handling_of(result: Mapping[str, float], scenario: Scenario) -> Handling:
    """What two servers cost beside their blocks, half for each: `scenario` knows no handling.

    The client's own part, and what one engine's thread and the loop cost each other, are in it.
    """
    known = simulate_analytic(scenario).summary()
    parts = [result[key] - known[key] for key in ("step_s_mean", "first_token_s_mean")]
    step_s, first_s = (max(0.0, part / 2) for part in parts)
    return Handling(decode_s=step_s, prefill_s=first_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What was measured in turns, for so many sessions at once."""

    samples: list[tuple[Sample, Round]] = field(default_factory=list)
    results: list[tuple[Result, Round]] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        """Turns that count: of blocks or of sessions, whichever are fewer."""
        kept = [sum(not one.is_disturbed for _, one in of) for of in (self.samples, self.results)]
        return min(kept)

    @property
    def times(self) -> BlockTimes | None:
        """Of the samples in which everybody had a core; None: there were none."""
        kept = [sample for sample, one in self.samples if not one.is_disturbed]
        return block_times(kept) if kept else None

    @property
    def summary(self) -> dict[str, float] | None:
        """The round with the median response, of those in which everybody had a core."""
        kept = [(result, one) for result, one in self.results if not one.is_disturbed]
        kept.sort(key=lambda pair: pair[1].value)
        return kept[len(kept) // 2][0].summary() if kept else None

    def told(self) -> tuple[dict[str, float] | None, dict[str, Any]]:
        """The figures, and every turn."""
        return self.summary, self.details()

    def details(self) -> dict[str, Any]:
        """Every turn, for the JSON."""
        return {
            "blocks": Rounds(taken=[one for _, one in self.samples]).details(),
            "sessions": Rounds(taken=[one for _, one in self.results]).details(),
        }


async def take_turns(
    shape: str, servers: Sequence[Server], meter: BlockMeter, counts: Sequence[int], wanted: int
) -> dict[int, Turns]:
    """Blocks alone and sessions through them in turns: a machine is quicker now and slower then.

    By number of sessions at once; ends when `wanted` turns of each count, or after too many.
    """
    found = {count: Turns() for count in counts}
    # Not the client, which computes little: what it waits for is mostly its own servers.
    workers = workers_of(servers)
    async with connected(shape, servers) as client:
        for _ in range(2):  # links are up, caches of the allocator are warm
            await _session(client, shape)
        end_s = time.perf_counter() + ROUNDS_S
        for _ in range(wanted * ROUNDS_PER_WANTED):
            for count, turns in found.items():
                way = partial(meter.sample, at_once=count > 1)
                turns.samples.append(await _judged(way, meter.pids, _decode_s))
                ask = partial(_ask, client, shape, count)
                turns.results.append(await _judged(ask, workers, _response_s))
            if time.perf_counter() > end_s or all(
                turns.num_kept >= wanted for turns in found.values()
            ):
                break
    return found


async def _judged(
    measure: Callable[[], Awaitable[T]], workers: Mapping[str, int], value_of: Callable[[T], float]
) -> tuple[T, Round]:
    before = read_accounts()
    found = await measure()
    after = read_accounts()
    usage = usage_between(before, after, workers) if before and after else None
    return found, Round(value=value_of(found), usage=usage)


def _decode_s(sample: Sample) -> float:
    return sample[0, 1, 1]


def _response_s(result: Result) -> float:
    return result.summary()["response_s_mean"]


async def _ask(client: Client, shape: str, count: int) -> Result:
    """So many sessions at once."""
    zero_s = time.perf_counter()
    served = await asyncio.gather(*(_session(client, shape, zero_s) for _ in range(count)))
    return Result(
        fidelity="measured", seed=0, served=tuple(served), placement=Placement(spans=(None, None))
    )


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
