"""A proposal: the best placement that any rule finds for a goal, and what to expect of it.

`propose` tries the rules in the order of their cost, anneals from the best, and compares
all by the goal (`shoal.plan.trying`). It says how far the best may be from what nothing
can beat, and what the change from the present placement takes. `shoal.plan.advice` says
it in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.base.errors import NoRouteError
from shoal.plan.bounds import fits_at_all
from shoal.plan.change import Change, change_between
from shoal.plan.outlook import Outlook, look_ahead
from shoal.plan.place.latency import GAIN_MIN
from shoal.plan.placement import Placement, check_placement
from shoal.plan.spec import Problem
from shoal.plan.splits import Split, fastest_splits
from shoal.plan.trying import (
    PRESENT,
    Budget,
    Objective,
    Progress,
    Trials,
    Tried,
    merit,
    value_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to do, why, and what to expect."""

    objective: Objective
    best: Tried
    """`PRESENT` as its policy: stay."""
    value: float
    """By the objective: seconds, or tokens per second; with pareto seconds per token."""
    bound: float
    """Nothing can be better than this."""
    gap: float
    """How much of `value` a better placement might still win, as a share of it (of the
    bound, for throughput). Infinite while sessions are without a place: the bound is for
    all of them, the value for the others."""
    tried: tuple[Tried, ...]
    """By the objective, the best first."""
    failed: dict[str, str]
    """Rules without a placement: why."""
    skipped: tuple[str, ...]
    """Rules that the time did not suffice for."""
    front: tuple[Tried, ...]
    """With pareto: by rising seconds per token."""
    splits: tuple[Split, ...]
    """The fastest chains of one session over 1, 2, ... servers."""
    present: Outlook | None
    change: Change | None
    """From the present placement; None: there is none."""


def propose(
    problem: Problem,
    objective: Objective,
    *,
    seed: int = 0,
    policy: str = "auto",
    present: Placement | None = None,
    load_bytes_per_s: Sequence[float] | None = None,
    budget: Budget | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Proposal:
    """The best placement for `objective`, by all rules (`auto`) or by one.

    The same arguments give the same answer unless the budget runs out. Moving away from
    `present` has to gain more than `GAIN_MIN` where it covers all blocks.

    Raises:
        NoRouteError: no rule covers all blocks; says how much memory there is.
        ConfigError: an unknown rule, or a present placement that can't be.
    """
    if present is not None:
        check_placement(problem, present)
    trials = Trials(problem, objective, seed, budget or Budget(), progress)
    trials.all(policy, present)
    if not trials.tried:
        raise _hopeless(problem, trials.failed)
    front = _front(list(trials.tried.values())) if objective == "pareto" else ()
    ranked = sorted(trials.tried.values(), key=lambda one: merit(one.outlook, objective))
    best = _knee(front) if front else ranked[0]
    now = next((one for one in ranked if one.policy == PRESENT), None)
    if now is not None and policy == "auto" and _is_as_good(now.outlook, best.outlook, objective):
        best = now
    value, bound = value_of(best.outlook, objective), trials.bound()
    counts_some = (
        best.outlook.unplaced
        and objective != "throughput"
        and not (objective == "response" and problem.workload.requests_per_s)
    )
    return Proposal(
        objective=objective,
        best=best,
        value=value,
        bound=bound,
        gap=math.inf if counts_some else _gap(value, bound, objective),
        tried=tuple(ranked),
        failed=trials.failed,
        skipped=tuple(trials.skipped),
        front=front,
        splits=fastest_splits(problem),
        present=None if present is None else look_ahead(problem, present, trials.rates),
        change=None
        if present is None
        else change_between(problem, present, best.placement, load_bytes_per_s),
    )


def _is_as_good(now: Outlook, best: Outlook, objective: Objective) -> bool:
    """Whether leaving `now` for `best` gains too little to be worth it."""
    goals: tuple[Objective, ...] = (objective,)
    if objective == "pareto":
        goals = ("latency", "throughput")
    if min(now.replicas) == 0 or now.unplaced > best.unplaced:
        return False
    for goal in goals:
        old, new = value_of(now, goal), value_of(best, goal)
        gain = new - old if goal == "throughput" else old - new
        if math.isinf(old) and math.isinf(new):
            continue
        if not gain <= GAIN_MIN * old:
            return False
    return True


def _gap(value: float, bound: float, objective: Objective) -> float:
    if objective == "throughput":
        return max(0.0, 1 - value / bound) if 0 < bound < math.inf else math.inf
    return max(0.0, 1 - bound / value) if 0 < value < math.inf else math.inf


def _front(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """Those that none other beats in seconds per token and in tokens per second."""
    placed = [one for one in tried if not one.outlook.unplaced]
    ordered = sorted(placed, key=lambda one: (one.outlook.step_s, -one.outlook.rows_per_s))
    found: list[Tried] = []
    for one in ordered:
        if not found or one.outlook.rows_per_s > found[-1].outlook.rows_per_s * (1 + 1e-9):
            found.append(one)
    return tuple(found)


def _knee(front: Sequence[Tried]) -> Tried:
    """The point with the largest tokens per second for its seconds per token."""
    return max(
        front,
        key=lambda one: (
            one.outlook.rows_per_s / one.outlook.step_s if one.outlook.step_s else math.inf
        ),
    )


def _hopeless(problem: Problem, failed: dict[str, str]) -> NoRouteError:
    have = sum(server.memory_bytes for server in problem.servers)
    blocks = problem.num_blocks
    need = sum(problem.lightest_blocks)
    if not fits_at_all(problem):
        return NoRouteError(
            f"no placement exists: {blocks} blocks with one session need {need / 1e9:.4g} GB, all "
            f"{len(problem.servers)} servers together have {have / 1e9:.4g} GB (add servers or "
            "memory, quantise the model, or plan for shorter sessions)",
            missing=[(0, blocks)],
        )
    why = next(iter(failed.values()), "all rules were skipped: allow more time")
    return NoRouteError(f"no rule found a placement; the first one says: {why}")
