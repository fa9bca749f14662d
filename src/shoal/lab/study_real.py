"""Round trips of real hosts and recorded requests, in the place of BPRR's maps and equal lengths.

With a file of each (`study_data`): Petals and BPRR's proposal on hosts at random, then with
requests as they were recorded, whose lengths nobody knows before. Memory is reserved for the
longest answer, as both do, or for the mean one; and once more on the real client and servers,
where caches grow: the same code with pages as large as the longest request reserves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

from shoal.base.errors import ConfigError, NoRouteError
from shoal.lab.campaign import quiet
from shoal.lab.sim_live import simulate_live
from shoal.lab.sim_result import Result
from shoal.lab.sim_scenario import Request, Scenario, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.lab.study import Check, Figure, Row, Task, falling, mean
from shoal.lab.study_bloom import (
    MEMORY_9,
    MEMORY_26,
    METHODS,
    SETUP_S,
    Load,
    Memory,
    placed,
    testbed,
)
from shoal.lab.study_data import Rtts, stretch
from shoal.plan.place.cgbp import choose_sessions
from shoal.plan.spec import Problem

PAIR: Final = ("petals", "proposed")

TOKENS_IN_MAX, TOKENS_OUT_MAX = 2048, 1024
"""Longer requests are left out, as Helix does with this trace: models of the time had no room."""

DRAWN: Final = Load(requests_per_s=0.5, tokens_out=128)
RATE_PER_S: Final = 0.05
"""Of recorded requests, which are some 8 times as long."""

LIVE_RATE_PER_S: Final = 0.2
LIVE_REQUESTS: Final = 12
LIVE_SEEDS_MAX: Final = 3
"""Each run of the real code takes up to a minute: sessions that wait ask all the time."""

LIVE_LIMIT_S: Final = 4 * 3600.0
"""Who is not answered by then, never is: a placement made for short requests may have no room
for the longest anywhere."""

PAGE_TOKENS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """Servers of a testbed."""

    count: int
    num_fast: int
    memory: Memory


BEDS: Final = (
    Bed(count=9, num_fast=2, memory=MEMORY_9),
    Bed(count=26, num_fast=5, memory=MEMORY_26),
)


def _beds(task: Task) -> tuple[Bed, ...]:
    return BEDS[: 1 if task.is_quick else None]


def check_data(task: Task) -> None:
    """Before minutes of work: is what was given enough?

    Raises:
        ConfigError: too few hosts for the servers and a client, or too few requests.
    """
    data, num_servers = task.data, _beds(task)[-1].count
    if data.rtts is not None and data.rtts.num_hosts <= num_servers:
        raise ConfigError(
            f"the table of round trips has {data.rtts.num_hosts} hosts, and {num_servers} servers "
            f"and a client need {num_servers + 1}: give a larger one"
        )
    if data.requests is None:
        return
    known = len(data.requests.within(TOKENS_IN_MAX, TOKENS_OUT_MAX))
    if known < DRAWN.requests:
        raise ConfigError(
            f"{known} of {len(data.requests.requests)} recorded requests have at most "
            f"{TOKENS_IN_MAX} + {TOKENS_OUT_MAX} tokens, and a run needs {DRAWN.requests}: "
            "give a longer recording"
        )


def on_hosts(rtts: Rtts, bed: Bed, load: Load, seed: int) -> Problem:
    """One client and the bed's servers on hosts at random; for `check_data` there are enough."""
    rng = random.Random(f"hosts {seed}")
    home, *hosts = rng.sample(range(rtts.num_hosts), bed.count + 1)
    fast = [server < bed.num_fast for server in range(bed.count)]
    rng.shuffle(fast)
    return testbed(
        fast,
        [rtts.rtt_s[home][host] for host in hosts],
        [[rtts.rtt_s[one][other] for other in hosts] for one in hosts],
        load,
        bed.memory,
    )


def made_for(problem: Problem, requests: Sequence[Request], rate_per_s: float) -> Problem:
    """The problem with the mean of such requests for its workload.

    Raises:
        NoRouteError: not even one of them fits.
    """
    workload = replace(
        problem.workload,
        tokens_in=round(fmean(one.tokens_in for one in requests)),
        tokens_out=round(fmean(one.tokens_out for one in requests)),
        requests_per_s=rate_per_s,
    )
    problem = replace(problem, workload=workload)
    return replace(problem, workload=replace(workload, sessions=choose_sessions(problem)))


def for_longest(problem: Problem) -> Problem:
    """The problem with memory for the longest request that may come."""
    workload = replace(problem.workload, tokens_in=TOKENS_IN_MAX, tokens_out=TOKENS_OUT_MAX)
    return replace(problem, workload=workload)


def reserved(
    problem: Problem, requests: tuple[Request, ...], method: str, seed: int, *, is_longest: bool
) -> Result:
    """One run at fidelity B: placed for the mean, memory for it or for the longest.

    Raises:
        NoRouteError: the method leaves blocks uncovered.
    """
    rules = METHODS[method]
    return simulate_slots(
        Scenario(
            problem=for_longest(problem) if is_longest else problem,
            requests=requests,
            placement=placed(problem, method, seed),
            router=rules.router,
            waiting=rules.waiting,
            knows_only_expected=True,
            setup_s=SETUP_S,
            seed=seed,
        )
    )


def live(problem: Problem, requests: tuple[Request, ...], seed: int, page_tokens: int) -> Result:
    """One run of the real client and servers, where the proposal puts them; servers push.

    A prompt's fixed time per block is spread over its tokens: our servers cut prompts into
    chunks, and each would pay it.

    Raises:
        NoRouteError: blocks are left over.
    """
    tokens = problem.workload.tokens_in
    servers = tuple(
        replace(
            server,
            prefill_s_per_block=0.0,
            prefill_s_per_block_token=server.prefill_s(tokens) / tokens,
        )
        for server in problem.servers
    )
    changed = replace(
        for_longest(problem),
        servers=servers,
        links=replace(problem.links, flow="push"),
        model=replace(problem.model, page_tokens=page_tokens),
    )
    with quiet():
        return simulate_live(
            Scenario(
                problem=changed, requests=requests, placement=placed(problem, "proposed", seed)
            ),
            limit_s=LIVE_LIMIT_S,
        )


def real_rows(task: Task) -> tuple[list[Row], list[Check]]:
    """What the data that was given allows to show."""
    rtts = task.data.rtts
    if rtts is None:
        return [], []
    beds = _beds(task)
    rows = [_hosts_row(task, rtts, bed) for bed in beds]
    checks = [_quicker(row) for row in rows]
    if task.data.requests is not None:
        for bed in beds:
            found = _requests_rows(task, rtts, bed)
            rows += found
            checks += map(_quicker, found)
        row = _caches_row(task, rtts)
        rows.append(row)
        values = [row.value(f"{name}, response s") for name in ("reserved", "growing")]
        checks.append(falling("caches that grow: reserved > growing", values))
    return rows, checks


def _hosts_row(task: Task, rtts: Rtts, bed: Bed) -> Row:
    cases = []
    for seed in task.told(f"{bed.count} real hosts", range(task.seeds)):
        problem = on_hosts(rtts, bed, DRAWN, seed)
        rng = random.Random(f"requests {seed}")
        arrivals = poisson(rng, DRAWN.requests_per_s)
        requests = draw_requests(problem, arrivals, DRAWN.requests, rng)
        case = _pair(problem, requests, seed, is_longest=False)
        if case is not None:
            cases.append(case)
    keys = (("servers", str(bed.count)), ("requests", "0.5/s of 20 + 128"))
    return _row("real hosts", keys, cases)


def _requests_rows(task: Task, rtts: Rtts, bed: Bed) -> list[Row]:
    """Recorded requests; memory for the longest, and for the mean."""
    cases: dict[bool, list[dict[str, dict[str, float]]]] = {True: [], False: []}
    for seed in task.told(f"{bed.count} real hosts, real requests", range(task.seeds)):
        problem, requests = _recorded(task, rtts, bed, RATE_PER_S, DRAWN.requests, seed)
        for is_longest, own in cases.items():
            case = _pair(problem, requests, seed, is_longest=is_longest)
            if case is not None:
                own.append(case)
    return [
        _row(
            "real hosts and requests",
            (
                ("servers", str(bed.count)),
                ("memory for", "the longest" if is_longest else "the mean"),
            ),
            own,
        )
        for is_longest, own in cases.items()
    ]


def _recorded(
    task: Task, rtts: Rtts, bed: Bed, rate_per_s: float, count: int, seed: int
) -> tuple[Problem, tuple[Request, ...]]:
    """A bed made for the whole recording, and a stretch of it."""
    known = task.data.requests
    taken = () if known is None else known.within(TOKENS_IN_MAX, TOKENS_OUT_MAX)
    requests = stretch(taken, count, rate_per_s, random.Random(f"stretch {seed}"))
    problem = made_for(on_hosts(rtts, bed, DRAWN, seed), taken, rate_per_s)
    return problem, requests


def _pair(
    problem: Problem, requests: tuple[Request, ...], seed: int, *, is_longest: bool
) -> dict[str, dict[str, float]] | None:
    """Both methods' summaries; None where one can't cover the model."""
    try:
        return {
            name: reserved(problem, requests, name, seed, is_longest=is_longest).summary()
            for name in PAIR
        }
    except NoRouteError:
        return None


def _row(
    table: str, keys: tuple[tuple[str, str], ...], cases: Sequence[dict[str, dict[str, float]]]
) -> Row:
    figures = []
    for name in PAIR:
        for key, what in (("response_s_mean", "response s"), ("wait_s_mean", "wait s")):
            value = mean([case[name][key] for case in cases])
            figures.append(Figure(name=f"{name}, {what}", value=value))
    reduction = 1 - figures[2].value / figures[0].value
    figures.append(Figure(name="reduction", value=reduction))
    figures.append(Figure(name="cases", value=len(cases)))
    return Row(table=table, keys=keys, figures=tuple(figures))


def _quicker(row: Row) -> Check:
    name = ", ".join(f"{key} {value}" for key, value in row.keys)
    return Check(
        name=f"{row.table}, {name}: the proposal is quicker by 10 % or more",
        found=f"{row.value('reduction'):.0%}",
        holds=row.value("reduction") >= 0.1,
    )


def _caches_row(task: Task, rtts: Rtts) -> Row:
    """The real client and servers: caches that grow, and the longest request reserved."""
    pages = {"reserved": TOKENS_IN_MAX + TOKENS_OUT_MAX, "growing": PAGE_TOKENS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
    count = LIVE_REQUESTS // (3 if task.is_quick else 1)
    for seed in task.told("real client and servers", range(min(task.seeds, LIVE_SEEDS_MAX))):
        problem, requests = _recorded(task, rtts, BEDS[0], LIVE_RATE_PER_S, count, seed)
        for name, page_tokens in pages.items():
            found[name].append(live(problem, requests, seed, page_tokens).summary())
    figures = []
    for name, runs in found.items():
        for key, what in (
            ("response_s_mean", "response s"),
            ("first_token_s_mean", "first token s"),
            ("failed", "not answered"),
        ):
            figures.append(Figure(name=f"{name}, {what}", value=mean([run[key] for run in runs])))
    figures.append(Figure(name="cases", value=len(found["growing"])))
    keys = (("servers", "9"), ("placed by", "the proposal"))
    return Row(table="caches on the real client and servers", keys=keys, figures=tuple(figures))


REAL_NOTES: Final = (
    "Real hosts: the client and the servers sit on hosts drawn from the table. Real requests: a "
    "stretch of the recording from a random place, requests of more than 2,048 + 1,024 tokens left "
    "out (as Helix does), slowed down to the rate that is said; nobody knows how long answers get. "
    "BLOOM has room for 2,048 positions; that is not minded here.",
    "Memory for the longest: what both methods reserve if any request may come. Petals' fixed "
    "cache of 4,096 tokens per block then holds one session at a time. For the mean: the best that "
    "caches which grow could do, if none had ever to give way.",
    "Caches: 12 requests at 0.2/s on the real client and servers, placed as the proposal does, "
    "servers push. `reserved` has pages of 3,072 tokens, so that each session takes the longest "
    "at once; `growing` has pages of 16. All else is the same code.",
)
