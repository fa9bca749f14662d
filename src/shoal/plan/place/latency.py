"""Placement for response time: join where chains get shortest, move when it pays.

Source of the goal: Borisov, "block allocation for inference latency" (master thesis, HSE
2024): what counts for inference is how long answers take, not the rows per second of the
worst block. The full text was not at hand; the rules are a reconstruction of ours.

A candidate start is where spans of others begin or end: chains are short when ends meet.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from shoal.base.spans import Span
from shoal.plan.compose import Scorer, scorer
from shoal.plan.cost import Batch, Currency
from shoal.plan.petals import choose_span
from shoal.plan.place.cgbp import amortised
from shoal.plan.placement import Placement, covering, replicas
from shoal.plan.spec import Problem

GAIN_MIN: Final = 0.03
"""A move must shorten the mean by this share; measured times are no better."""

REPLICAS_MIN: Final = 2
"""Blocks with fewer replicas are in danger, and count against a placement."""

ROUNDS_MAX: Final = 10
"""Rounds of best responses. Each lowers the goal by `GAIN_MIN`; a few rounds are usual."""


DANGER_S: Final = 0.01
"""Seconds per token that a block with a single replica counts for (after Borisov)."""


class Merit(NamedTuple):
    """How good a placement is for latency; compared in order, less is better."""

    uncovered: int
    unplaced: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What to minimise: mean seconds, and something for each block in danger."""

    score: Scorer
    danger_s: float = 0.0
    """Seconds that each block with fewer than `REPLICAS_MIN` replicas counts for."""

    def __call__(self, placement: Placement) -> Merit:
        uncovered, unplaced, seconds = self.score(placement)
        if self.danger_s:
            count = replicas(self.score.problem, placement)
            seconds += self.danger_s * sum(one < REPLICAS_MIN for one in count)
        return Merit(uncovered, unplaced, seconds)


def careful_goal(problem: Problem, *, currency: Currency = "token", batch: Batch = 1) -> Goal:
    """The goal of servers that may vanish: `DANGER_S` for each token and block in danger."""
    tokens = 1 if currency == "token" else problem.workload.tokens_out
    return Goal(score=scorer(problem, currency=currency, batch=batch), danger_s=DANGER_S * tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCost:
    """What a move costs: its reload, counted against what it saves until `horizon_s`."""

    reload_s: float = 0.0
    """Seconds that the server's sessions are without it."""
    sessions_now: float = 0.0
    sessions_per_s: float = 0.0
    """Rate of what the goal's seconds are seconds of (tokens or requests)."""
    horizon_s: float = 0.0

    def is_paid_by(self, gain_s: float) -> bool:
        """Whether a gain of `gain_s` per token or request outweighs the move."""
        return gain_s * self.sessions_per_s * self.horizon_s >= self.reload_s * self.sessions_now


FREE_SWITCH: Final = SwitchCost()


def place_latency(problem: Problem, rng: random.Random, *, goal: Goal | None = None) -> Placement:
    """Fast servers join first, each at the best place; then best responses to the end.

    The default goal is the mean response time of the workload's sessions.

    Raises:
        NoRouteError: some block is left over.
    """
    goal = goal or Goal(score=scorer(problem, currency="request"))
    placement = Placement(spans=(None,) * len(problem.servers))
    ranked = amortised(problem, problem.workload.sessions)
    for one in ranked:
        span = choose_join(goal, placement, one.server, one.num_blocks)
        placement = placement.moved(one.server, span)
    return covering(problem, settle(goal, placement, [one.server for one in ranked]))


def choose_join(goal: Goal, placement: Placement, server: int, num_blocks: int) -> Span:
    """Where a server with room for `num_blocks` blocks should join.

    While blocks are uncovered, Petals' rule on replicas, which covers them; then the
    candidate that is best for the goal, of equals the first.
    """
    count = replicas(goal.score.problem, placement)
    if not min(count):
        return choose_span(count, num_blocks)
    spans = candidates(goal.score.problem, placement, num_blocks)
    return min(spans, key=lambda span: goal(placement.moved(server, span)))


def choose_move(
    goal: Goal, placement: Placement, server: int, switch: SwitchCost = FREE_SWITCH
) -> Span | None:
    """Where a server should move to, or None: stay.

    It moves when that lowers the goal by more than `GAIN_MIN` and pays for the switch;
    never when more blocks would be uncovered or more sessions without a place.
    """
    span = placement.spans[server]
    if span is None:
        return None
    now = goal(placement)
    options = candidates(goal.score.problem, placement.moved(server, None), len(span))
    target = min(options, key=lambda one: goal(placement.moved(server, one)))
    then = goal(placement.moved(server, target))
    if target == span or then >= now:
        return None
    if then[:2] < now[:2]:
        return target
    gain_s = now.seconds - then.seconds
    if gain_s <= GAIN_MIN * now.seconds or not switch.is_paid_by(gain_s):
        return None
    return target


def settle(goal: Goal, placement: Placement, order: Sequence[int]) -> Placement:
    """Best responses in turn until nobody moves."""
    for _ in range(ROUNDS_MAX):
        has_moved = False
        for server in order:
            target = choose_move(goal, placement, server)
            if target is not None:
                placement, has_moved = placement.moved(server, target), True
        if not has_moved:
            break
    return placement


def candidates(problem: Problem, placement: Placement, num_blocks: int) -> list[Span]:
    """Spans of `num_blocks` that begin or end where others do, or the model does."""
    last = problem.num_blocks - num_blocks
    starts = {0, last}
    for _, span in placement.hosted():
        for border in (span.start, span.end):
            starts |= {border, border - num_blocks}
    return [Span(start, start + num_blocks) for start in sorted(starts) if 0 <= start <= last]
