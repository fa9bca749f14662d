"""Problems of placement for tests: random ones, published settings, answers by brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.lab import study_bloom
from shoal.plan.compose import needs_on
from shoal.plan.cost import Chain, Hop, Prices, chain_s, prices
from shoal.plan.memory import CacheShape, mha, quantised_bytes
from shoal.plan.placement import Placement, free_bytes, uncovered
from shoal.plan.search import Extra
from shoal.plan.spec import (
    DecodeTimes,
    Exits,
    Flow,
    Links,
    ModelSpec,
    Problem,
    ServerSpec,
    Workload,
    uniform_model,
)


def server(memory_bytes: int, block_s: float = 0.01, **more: Any) -> ServerSpec:
    decode = DecodeTimes(points=((1, block_s),))
    return replace(ServerSpec(name="s", memory_bytes=memory_bytes, decode=decode), **more)


def simple(
    memory: list[int],
    num_blocks: int,
    *,
    weight: int = 10,
    cache: int = 1,
    block_s: list[float] | None = None,
    rtt_s: list[float] | None = None,
    sessions: int = 1,
    requests_per_s: float = 0.0,
) -> Problem:
    """Equal blocks, one client, hub; a session takes `cache` bytes per block."""
    times = block_s or [0.01] * len(memory)
    return Problem(
        model=uniform_model(num_blocks, weight, CacheShape(values_per_token=0, state_bytes=cache)),
        servers=tuple(server(size, time) for size, time in zip(memory, times, strict=True)),
        links=Links(client_rtt_s=(tuple(rtt_s or [0.05] * len(memory)),)),
        workload=Workload(
            tokens_in=1, tokens_out=1, sessions=sessions, requests_per_s=requests_per_s
        ),
    )


def tight(servers: int, num_blocks: int, sessions: int, slack: float, seed: int) -> Problem:
    """Little memory: `slack` times what the sessions need, shared out unevenly."""
    rng = random.Random(seed)
    is_far = rng.random() < 0.5
    fast = [rng.random() < 0.3 for _ in range(servers)]
    shares = [(3 if one else 1) * rng.uniform(0.7, 1.3) for one in fast]
    whole = num_blocks * (1 + 0.12 * sessions) * slack * 10**9
    return simple(
        [int(share / sum(shares) * whole) for share in shares],
        num_blocks,
        weight=10**9,
        cache=12 * 10**7,
        block_s=[(3.2 if one else 16.2) * rng.uniform(0.8, 1.25) / 1e3 for one in fast],
        rtt_s=[(rng.uniform(80, 200) if is_far else rng.uniform(5, 30)) / 1e3 + 0.02 for _ in fast],
        sessions=sessions,
    )


BLOOM_BLOCK_BYTES = quantised_bytes(2_466_437_120, 4.25, 1.01)


def bloom(
    fast: int, slow: int, raw_rtt_s: list[float], *, rate: float, tokens_out: int, sessions: int = 1
) -> Problem:
    """The testbed of BPRR: BLOOM-176B on A100s and their sevenths; their constants."""
    large = replace(study_bloom.FAST, memory_bytes=86_130_000_000)
    small = replace(study_bloom.SLOW, memory_bytes=9_100_000_000)
    return Problem(
        model=uniform_model(70, BLOOM_BLOCK_BYTES, mha(112, 128), hidden_size=14336),
        servers=(large,) * fast + (small,) * slow,
        links=Links(
            client_rtt_s=(tuple(raw_rtt_s),),
            server_rtt_s=tuple(tuple(raw_rtt_s) for _ in raw_rtt_s),
            handling_s=0.1,
            prefill_handling_s=0.067,
            prefill_s_per_token=0.0007049,
        ),
        workload=Workload(
            tokens_in=20, tokens_out=tokens_out, requests_per_s=rate, sessions=sessions
        ),
    )


FLOWS: list[Flow] = ["hub", "push"]
TIMES = st.sampled_from([0.0, 0.003, 0.01, 0.02, 0.05])
RTTS = st.sampled_from([0.0, 0.01, 0.04, 0.1, 0.25])


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    servers_max: int = 5,
    blocks_max: int = 6,
    flow: Flow | None = None,
    clients_max: int = 2,
    exits: Exits = "end",
) -> Problem:
    """Small problems of any kind: unequal blocks, windows, logs, hub and push."""
    count = draw(st.integers(1, servers_max))
    blocks = draw(st.integers(1, blocks_max))
    rows = st.lists(RTTS, min_size=count, max_size=count).map(tuple)
    clients = draw(st.integers(1, clients_max))
    cache = st.builds(
        CacheShape,
        values_per_token=st.integers(0, 2),
        value_bytes=st.just(1),
        window=st.sampled_from([None, 2]),
    )
    return Problem(
        model=ModelSpec(
            hidden_size=1,
            weight_bytes=tuple(
                draw(st.lists(st.sampled_from([10, 10, 14]), min_size=blocks, max_size=blocks))
            ),
            caches=tuple(draw(st.lists(cache, min_size=blocks, max_size=blocks))),
            row_bytes=1,
            keeps_logs=draw(st.booleans()),
        ),
        servers=tuple(
            server(draw(st.integers(0, 16 * blocks)), draw(TIMES), link_bytes_per_s=1000.0)
            for _ in range(count)
        ),
        links=Links(
            client_rtt_s=tuple(draw(rows) for _ in range(clients)),
            server_rtt_s=tuple(draw(rows) for _ in range(count)),
            flow=draw(st.sampled_from(FLOWS)) if flow is None else flow,
            handling_s=draw(st.sampled_from([0.0, 0.002])),
        ),
        workload=Workload(
            tokens_in=draw(st.integers(1, 2)),
            tokens_out=draw(st.integers(1, 3)),
            sessions=draw(st.integers(1, 3)),
            requests_per_s=draw(st.sampled_from([0.0, 0.5])),
        ),
        exits=exits,
    )


@st.composite
def placements(draw: st.DrawFn, problem: Problem) -> Placement:
    """Any spans that fit; they need not cover all blocks."""
    spans: list[Span | None] = []
    for one in range(len(problem.servers)):
        most = problem.blocks_max(one, 1)
        if not most or draw(st.integers(0, 5)) == 0:
            spans.append(None)
            continue
        size = draw(st.integers(1, most))
        start = draw(st.integers(0, problem.num_blocks - size))
        spans.append(Span(start, start + size))
    return Placement(spans=tuple(spans))


def every_chain(
    problem: Problem, placement: Placement, exits: Exits, start: int = 0, before: int = -1
) -> Iterator[Chain]:
    """Every chain over all blocks from `start` on; a server never follows itself."""
    if start == problem.num_blocks:
        yield ()
        return
    for one, span in placement.hosted():
        if start not in span or one == before:
            continue
        for end in range(span.end if exits == "end" else start + 1, span.end + 1):
            for rest in every_chain(problem, placement, exits, end, one):
                yield Hop(one, Span(start, end)), *rest


def cheapest_of_all(
    problem: Problem,
    placement: Placement,
    price: Prices,
    exits: Exits = "end",
    extras: list[Extra | None] | None = None,
) -> float | None:
    def seconds(chain: Chain) -> float:
        total = chain_s(price, chain)
        for hop in chain:
            extra = extras[hop.server] if extras else None
            total += extra(hop.span) if extra else 0.0
        return total

    return min(map(seconds, every_chain(problem, placement, exits)), default=None)


def every_placement(problem: Problem) -> Iterator[Placement]:
    """Every placement whose weights fit; some servers may be empty."""
    options: list[list[Span | None]] = []
    for one in range(len(problem.servers)):
        spans: list[Span | None] = [None]
        for start in range(problem.num_blocks):
            for end in range(start + 1, problem.num_blocks + 1):
                span = Span(start, end)
                if problem.can_host(one, span):
                    spans.append(span)
        options.append(spans)
    for chosen in product(*options):
        placement = Placement(spans=chosen)
        if not uncovered(problem, chosen):
            yield placement


def least_mean_s(problem: Problem) -> float | None:
    """The optimum of placement and routing together: mean seconds per token, by trying all."""
    best: float | None = None
    each = [prices(problem, client, "token") for client in range(problem.num_clients)]
    for placement in every_placement(problem):
        chains = list(every_chain(problem, placement, problem.exits))
        room = [free_bytes(problem, placement, one) for one in range(len(problem.servers))]
        total = _assign(problem, chains, each, room, 0)
        if total is not None and (best is None or total < best):
            best = total
    return None if best is None else best / problem.workload.sessions


def _assign(
    problem: Problem, chains: list[Chain], each: list[Prices], room: list[int], session: int
) -> float | None:
    if session == problem.workload.sessions:
        return 0.0
    best: float | None = None
    for chain in chains:
        needs = needs_on(problem, chain)
        if any(need > room[one] for one, need in needs.items()):
            continue
        left = list(room)
        for one, need in needs.items():
            left[one] -= need
        rest = _assign(problem, chains, each, left, session + 1)
        if rest is not None:
            seconds = chain_s(each[session % problem.num_clients], chain) + rest
            best = seconds if best is None else min(best, seconds)
    return best


def check_route(problem: Problem, placement: Placement, chain: Chain) -> None:
    """The chain covers all blocks in order, on servers that host what they run."""
    assert chain[0].span.start == 0
    assert chain[-1].span.end == problem.num_blocks
    for before, after in pairwise(chain):
        assert before.span.end == after.span.start
        assert before.server != after.server
    for hop in chain:
        hosted = placement.spans[hop.server]
        assert hosted is not None
        assert len(hop.span)
        assert hosted.covers(hop.span)
        if problem.exits == "end":
            assert hop.span.end == hosted.end
