"""CG-BP: conservative greedy block placement, and the sweep over its design number.

Source: Sun, He, Ji and Parag, "block placement and request routing" (BPRR,
arXiv 2512.21884), algorithm 1, lemma 2 and theorem 2. The sweep is ours: a smaller design
number packs more blocks into each server and often still seats all sessions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from shoal.base.spans import Span
from shoal.plan.compose import Scorer, mean_s, scorer
from shoal.plan.cost import typical_entries
from shoal.plan.petals import choose_span
from shoal.plan.placement import Placement, covering, uncovered
from shoal.plan.spec import Problem

TIE: Final = 1e-9
"""Windows whose sums differ by less than this share are equal: the first is taken."""

SWEEP_MAX: Final = 64
"""Design numbers that the sweep tries, evenly spread when there are more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amortised:
    """A server with what it can host, and its time per block with its round trip spread."""

    server: int
    num_blocks: int
    seconds_per_block: float


def place_cgbp(problem: Problem, rng: random.Random, *, sessions: int | None = None) -> Placement:
    """CG-BP for `sessions` concurrent sessions (default: those of the workload).

    Raises:
        NoRouteError: some block is left over.
    """
    return covering(problem, cgbp(problem, sessions or problem.workload.sessions))


def place_cgbp_sweep(
    problem: Problem, rng: random.Random, *, score: Scorer | None = None
) -> Placement:
    """CG-BP with the design number from 1 to twice the sessions that scores best.

    Raises:
        NoRouteError: none of them covers all blocks.
    """
    score = score or scorer(problem)
    sessions = problem.workload.sessions
    numbers = list(range(1, 2 * sessions + 1))
    if len(numbers) > SWEEP_MAX:
        step = len(numbers) / SWEEP_MAX
        numbers = sorted({sessions, *(numbers[int(index * step)] for index in range(SWEEP_MAX))})
    # The workload's own number first: the sweep is never worse than CG-BP.
    numbers.sort(key=lambda number: number != sessions)
    candidates = dict.fromkeys(cgbp(problem, number) for number in numbers)
    return covering(problem, min(candidates, key=score))


def choose_sessions(problem: Problem) -> int:
    """The design number R for the workload's rate (BPRR, choice of R).

    The mean number of requests in the system plus one standard deviation of a Poisson
    number, if each took as long as one alone under CG-BP(1); at most what memory surely
    allows, and lowered until CG-BP covers all blocks.

    Raises:
        NoRouteError: CG-BP covers them for no number.
    """
    alone = covering(problem, cgbp(problem, 1))
    jobs = problem.workload.requests_per_s * mean_s(problem, alone, currency="request", sessions=1)
    wanted = 1 if math.isinf(jobs) else max(1, round(jobs + math.sqrt(jobs)))
    number = min(wanted, max(1, sessions_surely(problem)))
    while number > 1 and uncovered(problem, cgbp(problem, number).spans):
        number -= 1
    return number


def sessions_surely(problem: Problem) -> int:
    """R_max: with at most so many sessions CG-BP covers all blocks; 0 promises nothing.

    `(sum M_j - s_m (L + J)) / (s_c (L + J))` (BPRR); of unequal blocks the largest count.
    """
    weights, session = problem.worst_bytes(1)
    places = problem.num_blocks + len(problem.servers)
    left = sum(server.memory_bytes for server in problem.servers) - weights * places
    return max(0, left // (session * places)) if session else problem.workload.sessions


def amortised(problem: Problem, sessions: int) -> list[Amortised]:
    """The servers that can host anything, by amortised time, fastest first."""
    entries = typical_entries(problem, "token")
    found = []
    for server, spec in enumerate(problem.servers):
        num_blocks = problem.blocks_max(server, sessions)
        if num_blocks:
            seconds = entries[server] / num_blocks + spec.decode.at(1)
            found.append(Amortised(server=server, num_blocks=num_blocks, seconds_per_block=seconds))
    return sorted(found, key=lambda one: (one.seconds_per_block, one.server))


def cgbp(problem: Problem, sessions: int) -> Placement:
    """CG-BP's placement, whether it covers all blocks or not.

    Each server in turn takes the window with the most remaining amortised time that
    holds an under-served block; when none is under-served, the window that seats fewest.
    """
    ranked = amortised(problem, sessions)
    slowest = max((one.seconds_per_block for one in ranked), default=0.0) + 1
    seated = [0] * problem.num_blocks
    remaining = [sessions * slowest] * problem.num_blocks
    spans: list[Span | None] = [None] * len(problem.servers)
    for one in ranked:
        if min(seated) < sessions:
            span = _neediest(remaining, seated, sessions, one.num_blocks)
        else:
            span = choose_span(seated, one.num_blocks)
        spans[one.server] = span
        seats = _seats(problem, one)
        for block in range(span.start, span.end):
            served = min(max(sessions - seated[block], 0), seats)
            remaining[block] -= (slowest - one.seconds_per_block) * served
            seated[block] += seats
    return Placement(spans=tuple(spans))


def _seats(problem: Problem, one: Amortised) -> int:
    weights, session = problem.worst_bytes(one.num_blocks)
    left = problem.servers[one.server].memory_bytes - weights
    return left // session if session else 1 << 30


def _neediest(remaining: list[float], seated: list[int], sessions: int, num_blocks: int) -> Span:
    """The first window with the most remaining time that holds an under-served block."""
    sums = list(accumulate(remaining, initial=0.0))
    lacking = list(accumulate((count < sessions for count in seated), initial=0))
    windows = [
        (sums[start + num_blocks] - sums[start], start)
        for start in range(len(seated) - num_blocks + 1)
        if lacking[start + num_blocks] > lacking[start]
    ]
    most = max(windows)[0]
    start = next(start for total, start in windows if total >= most - TIE * abs(most))
    return Span(start, start + num_blocks)
