"""Chains with capacities: how a placement serves many sessions at once.

`compose_chains` is GCA, greedy cache allocation, of Sun, He and Hou's chain composition
(arXiv 2604.14993, section on cache allocation; theorem 3: good enough for any
placement). It serves the dispatcher (`shoal.plan.route.dispatch`), the bounds on it, and
`mean_s`, by which placements are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from shoal.plan.cost import (
    Batch,
    Chain,
    Currency,
    Prices,
    at_batch,
    chain_s,
    mean_prices,
    prices,
)
from shoal.plan.placement import Placement, free_bytes, uncovered
from shoal.plan.search import Search
from shoal.plan.spec import Problem

SEATS_MAX: Final = 1 << 20
"""Sessions on one chain when they need no memory at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seated:
    """A chain, the seconds of one session on it, and how many it holds at once."""

    chain: Chain
    seconds: float
    seats: int


def room_of(problem: Problem, placement: Placement) -> list[int]:
    """By server: bytes for sessions."""
    return [free_bytes(problem, placement, server) for server in range(len(problem.servers))]


def needs_on(problem: Problem, chain: Chain) -> Counter[int]:
    """By server: the bytes that a session on `chain` needs there."""
    needs: Counter[int] = Counter()
    for hop in chain:
        needs[hop.server] += problem.session_bytes(hop.span)
    return needs


def seats_on(problem: Problem, chain: Chain, room: Sequence[int]) -> int:
    """How many sessions fit on `chain` into `room` bytes by server."""
    needs = needs_on(problem, chain)
    return min(room[server] // need if need else SEATS_MAX for server, need in needs.items())


def take(problem: Problem, chain: Chain, room: list[int], sessions: int) -> None:
    """Take the memory of `sessions` sessions on `chain` out of `room`."""
    for hop in chain:
        room[hop.server] -= sessions * problem.session_bytes(hop.span)


def compose_chains(
    problem: Problem,
    placement: Placement,
    price: Prices,
    *,
    sessions_max: int | None = None,
) -> tuple[Seated, ...]:
    """GCA: the fastest chain with all the sessions it can hold, then the next fastest...

    Ends when no chain has room left, or `sessions_max` sessions have a place.
    """
    sessions = SEATS_MAX if sessions_max is None else sessions_max
    search = Search(problem, placement, price)
    return tuple(_fill(problem, search, room_of(problem, placement), sessions))


def composed(
    problem: Problem, placement: Placement, batches: Sequence[int] = ()
) -> tuple[Seated, ...]:
    """GCA chains of whole requests for the average client, fastest first.

    As published a request's time does not depend on company. With `batches` (rising) it does:
    first as many sessions find a place as make passes of the first batch, at the time of such
    passes, then those that make the next one, and so on up to the last. A chain then comes
    back, slower and with more seats; its seats count all that run on it.
    """
    left = room_of(problem, placement)
    if not batches:
        batches, levels = (1,), [left]
    else:
        needs = [0 if span is None else problem.session_bytes(span) for span in placement.spans]
        levels = [[batch * need for need in needs] for batch in batches]
    chains: list[Seated] = []
    taken = [0] * len(left)
    alone = mean_prices(problem, "request")
    for batch, most in zip(batches, levels, strict=True):
        free = [min(a, b) - c for a, b, c in zip(left, most, taken, strict=True)]
        before = list(free)
        price = at_batch(problem, alone, "request", batch)
        chains += _fill(problem, Search(problem, placement, price), free, SEATS_MAX)
        taken = [a + b - c for a, b, c in zip(taken, before, free, strict=True)]
    seats: Counter[Chain] = Counter()
    found = []
    for one in sorted(chains, key=lambda one: one.seconds):
        seats[one.chain] += one.seats
        found.append(replace(one, seats=seats[one.chain]))
    return tuple(found)


class Score(NamedTuple):
    """How good a placement is; compared from the first field to the last, less is better."""

    uncovered: int
    """Blocks that nobody hosts, or servers whose weights don't fit."""
    unplaced: int
    """Sessions that find no chain with room."""
    seconds: float
    """Mean over the sessions that find one."""


def seat_all(
    problem: Problem, placement: Placement, each: Sequence[Prices], sessions: int
) -> list[list[Seated]]:
    """By client: the chains that its share of `sessions` sessions takes.

    Client by client, each session takes the fastest chain (by its client's prices) that
    still has room. Those that find none are left out.
    """
    room = room_of(problem, placement)
    search: Search | None = None
    found: list[list[Seated]] = []
    for share, price in zip(problem.shares(sessions), each, strict=True):
        if share:
            search = Search(problem, placement, price) if search is None else search.at(price)
        found.append([] if search is None else _fill(problem, search, room, share))
    return found


def _fill(problem: Problem, search: Search, room: list[int], sessions: int) -> list[Seated]:
    """GCA until `sessions` have a place, out of `room`, which it takes."""
    chains: list[Seated] = []
    while sessions > 0:
        found = search.cheapest(room=room)
        if found is None:
            break
        count = min(sessions, seats_on(problem, found.chain, room))
        if not count:
            break  # It comes to a server twice, which has no room for both runs together.
        take(problem, found.chain, room, count)
        sessions -= count
        chains.append(Seated(chain=found.chain, seconds=found.seconds, seats=count))
    return chains


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """By what placements of one problem are compared."""

    problem: Problem
    prices: tuple[Prices, ...]
    """By client."""
    sessions: int

    def __call__(self, placement: Placement) -> Score:
        """The score of `sessions` sessions that all run at once.

        Client by client, each session takes the fastest chain that still has room.
        """
        problem = self.problem
        holes = sum(map(len, uncovered(problem, placement.spans)))
        holes += sum(left < 0 for left in room_of(problem, placement))
        if holes:
            return Score(holes, self.sessions, 0.0)
        chains = seat_all(problem, placement, self.prices, self.sessions)
        placed = sum(one.seats for own in chains for one in own)
        total = sum(one.seats * one.seconds for own in chains for one in own)
        return Score(0, self.sessions - placed, total / placed if placed else 0.0)


def scorer(
    problem: Problem,
    *,
    currency: Currency = "token",
    sessions: int | None = None,
    batch: Batch = 1,
) -> Scorer:
    """The scorer of a problem; by default of its own number of sessions."""
    return Scorer(
        problem=problem,
        prices=tuple(
            prices(problem, client, currency, batch=batch) for client in range(problem.num_clients)
        ),
        sessions=problem.workload.sessions if sessions is None else sessions,
    )


def mean_s(
    problem: Problem,
    placement: Placement,
    *,
    currency: Currency = "token",
    sessions: int | None = None,
) -> float:
    """Mean seconds over the problem's concurrent sessions; infinite if not all have a place."""
    score = scorer(problem, currency=currency, sessions=sessions)(placement)
    return math.inf if score.uncovered or score.unplaced else score.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What all sessions at once get from a placement."""

    step_s: float
    """Mean seconds per token of a session."""
    tokens_per_s: float
    """Of all sessions together."""
    batches: tuple[int, ...]
    """By server: rows of its decode passes."""
    unplaced: int
    """Sessions without a place; the rest is about the others."""


def predict(problem: Problem, placement: Placement, *, sessions: int | None = None) -> Prediction:
    """Decode speed when `sessions` (default: the workload's) all decode in step.

    Every server then runs the rows of all its sessions in one pass, and its time per block
    is that of this batch. Sessions out of step get smaller batches: this is the slow case.
    """
    count = problem.workload.sessions if sessions is None else sessions
    alone = [prices(problem, client, "token") for client in range(problem.num_clients)]
    chains = seat_all(problem, placement, alone, count)
    rows = [0] * len(problem.servers)
    for own in chains:
        for one in own:
            for server in {hop.server for hop in one.chain}:
                rows[server] += one.seats
    batches = [max(1, batch) for batch in rows]
    steps = [
        (one.seats, chain_s(prices(problem, client, "token", batch=batches), one.chain))
        for client, own in enumerate(chains)
        for one in own
    ]
    placed = sum(seats for seats, _ in steps)
    return Prediction(
        step_s=sum(seats * step for seats, step in steps) / placed if placed else math.inf,
        tokens_per_s=sum(seats / step if step else math.inf for seats, step in steps),
        batches=tuple(rows),
        unplaced=count - placed,
    )
