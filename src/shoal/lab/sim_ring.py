"""A ring on virtual time: samples round a static chain, with the real client and server code.

Nodes run cost-model blocks. The starter's head is reckoned as part of its node's pass: the two
follow each other on the same core, as they do on a starter that has blocks. What comes back is
checked like everywhere in the lab.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.client.samples import SampleLimits, run_samples
from shoal.client.turnstile import Turnstile
from shoal.lab.clock import run_virtual
from shoal.lab.cost_backend import CostSequence, number_of, prompt_number, row_of
from shoal.lab.script import WrongText
from shoal.lab.sim_swarm import LiveSwarm
from shoal.lab.sim_user import ENCODING, warm_up
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.slots import RingTimes, Slots, choose_slots, slots_of
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.quotas import Quotas

Way = Literal["slots", "free", "single"]
"""slots: as `plan.slots` chooses. free: whoever waits runs, without a turnstile. single: one
sample per pass, as MDI-LLM does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCase:
    """A ring, its samples, and how they go round."""

    splits: tuple[int, ...]
    """Blocks of each node, the starter first."""
    block: DecodeTimes
    """Seconds of a decode pass through one block, on a node of speed 1."""
    head: DecodeTimes
    """Of embedding, head and sampling."""
    samples: int
    tokens: tuple[int, ...] = (48,)
    """New tokens of the samples, in turn."""
    prompt_tokens: int = 8
    prefill_s_per_block_token: float = 1e-4
    hop_s: float = 0.0
    """One way from a node to the next."""
    handling_s: float = 0.0
    """What software adds to each hop."""
    link_bytes_per_s: float = 1e9
    row_bytes: int = 2048
    speeds: tuple[float, ...] = ()
    """Of the nodes; empty: all 1."""
    way: Way = "slots"
    fixed_slots: int | None = None
    chunk_rows: int = 32
    seed: int = 1

    def __post_init__(self) -> None:
        if self.speeds and len(self.speeds) != len(self.splits):
            raise ConfigError(f"{len(self.splits)} nodes need as many speeds")

    def speed(self, server: int) -> float:
        """How many times as fast as a node of speed 1."""
        return self.speeds[server] if self.speeds else 1.0

    def stage(self, server: int) -> DecodeTimes:
        """A pass through all that a node computes."""
        batches = sorted({rows for rows, _ in (*self.block.points, *self.head.points)})
        points = []
        for rows in batches:
            seconds = self.splits[server] * self.block.at(rows)
            if server == 0:
                seconds += self.head.at(rows)
            points.append((rows, seconds / self.speed(server)))
        return DecodeTimes(points=tuple(points))

    def times(self) -> RingTimes:
        """What a measurement without error would say."""
        nodes = range(len(self.splits))
        ways = 1 if len(self.splits) == 1 else len(self.splits)
        row_s = self.row_bytes / self.link_bytes_per_s
        alone_s = ways * (self.hop_s + self.handling_s)
        points = tuple((rows, alone_s + ways * rows * row_s) for rows in (1, 64))
        return RingTimes(
            stages=tuple(self.stage(node) for node in nodes), hops=DecodeTimes(points=points)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RingResult:
    """What came of a ring."""

    tokens_per_s: float
    """Of all samples together, while none had ended (all decode)."""
    whole_tokens_per_s: float
    """From the start to the last token, prompts included."""
    busy: tuple[float, ...]
    """Of each node, in the time of `tokens_per_s`; 1 less this is the bubble."""
    slots: int
    rows_per_pass: float
    """Decode rows of the starter's passes, on average over the same time."""
    at_s: tuple[float, ...] = field(repr=False)
    """When each token came."""


def simulate_ring(case: RingCase) -> RingResult:
    """Run all samples to their ends.

    Raises:
        WrongText: a row is not what one machine would have said.
        Deadlock, Livelock: our code is stuck.
    """
    return run_virtual(lambda: _Run(case).run())


class _Sample:
    """One sequence of numbers; see `shoal.client.samples.Sample`."""

    def __init__(self, run: _Run, number: int) -> None:
        self._run = run
        self._prompt = [
            prompt_number(1000 * number + token) for token in range(run.case.prompt_tokens)
        ]
        self._left = run.case.tokens[number % len(run.case.tokens)]
        self._reference = CostSequence(Span(0, sum(run.case.splits)))
        self._expected = [self._reference.push(one) for one in self._prompt][-1]

    def begin(self, session: ChainSession) -> tuple[bytes, int]:
        """The prompt's rows."""
        rows = [row_of(one, self._run.hidden_size, ENCODING) for one in self._prompt]
        return b"".join(rows), len(rows)

    async def take(self, row: bytes, session: ChainSession) -> bytes | None:
        """The row itself goes round again."""
        number = number_of(row, ENCODING)
        if number != self._expected:
            raise WrongText(f"wrong row behind position {session.length - 1}")
        self._run.came()
        self._left -= 1
        if not self._left:
            self._run.ended()
            return None
        self._expected = self._reference.push(number)
        return row_of(number, self._run.hidden_size, ENCODING)

    def end(self) -> None:
        """Nothing to do."""


class _Run:
    def __init__(self, case: RingCase) -> None:
        self.case = case
        self._problem = _problem(case)
        self._tokens_s: list[float] = []
        self._begun = 0
        self._swarm: LiveSwarm | None = None
        self._window: list[tuple[float, tuple[float, ...], int, int]] = []

    @property
    def hidden_size(self) -> int:
        """Values of a row."""
        return max(16, self.case.row_bytes // 2)

    def came(self) -> None:
        """A token came. The window opens when all samples decode."""
        self._tokens_s.append(asyncio.get_running_loop().time())
        if len(self._tokens_s) == 4 * self.case.samples:
            self._look()

    def ended(self) -> None:
        """A sample ended. The window closes with the first."""
        if len(self._window) == 1:
            self._look()

    def _look(self) -> None:
        if self._swarm is None:
            return
        now_s = asyncio.get_running_loop().time()
        backends = [server.backend for server in self._swarm.servers]
        busy = tuple(0.0 if one is None else one.busy_s for one in backends)
        first = self._swarm.servers[0].server
        passes = 0 if first is None else first.engine.iteration
        self._window.append((now_s, busy, passes, len(self._tokens_s)))

    async def run(self) -> RingResult:
        case = self.case
        limits = EngineLimits(budget_tokens=1) if case.way == "single" else EngineLimits()
        config = ServerConfig(engine=limits, quotas=Quotas(cache_share=1.0))
        borders = [sum(case.splits[:node]) for node in range(len(case.splits) + 1)]
        placement = Placement(spans=tuple(Span(*pair) for pair in pairwise(borders)))
        rng = random.Random(case.seed)
        async with LiveSwarm(self._problem, rng, server_config=config) as swarm:
            self._swarm = swarm
            for server in swarm.servers:
                await server.start(placement)
            client = swarm.clients[0]
            await warm_up(client)
            started_s = asyncio.get_running_loop().time()
            turnstile = Turnstile(self._slots)
            failed = await run_samples(
                lambda: client.open_session(ENCODING),
                [_Sample(self, number) for number in range(case.samples)],
                turnstile,
                SampleLimits(
                    at_once=case.samples,
                    prompts_at_once=min(case.samples, len(case.splits)),
                    chunk_rows=case.chunk_rows,
                ),
            )
        for error in failed.values():  # nothing fails here: a bug
            raise error
        return self._result(started_s)

    def _slots(self, samples: int) -> Slots:
        case = self.case
        if case.way != "slots":
            return Slots(count=samples)
        if case.fixed_slots is not None:
            return slots_of(case.times(), samples, min(samples, case.fixed_slots))
        return choose_slots(case.times(), samples)

    def _result(self, started_s: float) -> RingResult:
        if len(self._window) < 2:
            raise ConfigError("samples are too short to tell anything: give them more tokens")
        (from_s, busy, passes, tokens), (to_s, busy_to, passes_to, tokens_to) = self._window
        wall_s = to_s - from_s
        return RingResult(
            tokens_per_s=(tokens_to - tokens) / wall_s,
            whole_tokens_per_s=len(self._tokens_s) / (self._tokens_s[-1] - started_s),
            busy=tuple((end - begin) / wall_s for begin, end in zip(busy, busy_to, strict=True)),
            slots=self._slots(self.case.samples).count,
            rows_per_pass=(tokens_to - tokens) / max(1, passes_to - passes),
            at_s=tuple(at_s - started_s for at_s in self._tokens_s),
        )


def _problem(case: RingCase) -> Problem:
    nodes = range(len(case.splits))
    servers = tuple(
        ServerSpec(
            name=f"node{node}",
            memory_bytes=10**12,
            decode=_per_block(case, node),
            prefill_s_per_block_token=case.prefill_s_per_block_token / case.speed(node),
            link_bytes_per_s=case.link_bytes_per_s,
        )
        for node in nodes
    )
    rtt_s = 2 * case.hop_s
    return Problem(
        model=uniform_model(
            sum(case.splits), 1 << 20, gqa(1, 16), hidden_size=case.row_bytes // 2,
            row_bytes=case.row_bytes,
        ),
        servers=servers,
        links=Links(
            client_rtt_s=(_client_rtts(case, rtt_s),),
            server_rtt_s=tuple(tuple(rtt_s for _ in nodes) for _ in nodes),
            flow="push",
            handling_s=case.handling_s,
        ),
        workload=Workload(tokens_in=case.prompt_tokens, tokens_out=max(case.tokens)),
    )  # fmt: skip


def _per_block(case: RingCase, server: int) -> DecodeTimes:
    stage = case.stage(server)
    blocks = case.splits[server]
    return DecodeTimes(points=tuple((rows, seconds / blocks) for rows, seconds in stage.points))


def _client_rtts(case: RingCase, rtt_s: float) -> tuple[float, ...]:
    """The client is on the starter's node: the way to it costs nothing, to the others a hop."""
    others: Sequence[int] = case.splits[1:]
    return (0.0, *(rtt_s for _ in others))
