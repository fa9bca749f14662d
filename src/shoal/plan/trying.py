"""Trying the rules of placement one after the other, and comparing what they find.

Each rule's placement is also tried with the memory that it leaves used for replicas.
`shoal.plan.proposal` makes an answer of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, get_args

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.bounds import request_bound_s, throughput_bound
from shoal.plan.compose import Scorer, scorer
from shoal.plan.cost import Currency
from shoal.plan.outlook import Outlook, fits, look_ahead
from shoal.plan.petals import choose_span
from shoal.plan.place.anneal import MOVES, MOVES_SERVERS, place_anneal
from shoal.plan.place.cgbp import SWEEP_MAX, cgbp
from shoal.plan.place.gbpcr import gbpcr
from shoal.plan.placement import Placement, covering, replicas, uncovered
from shoal.plan.policies import placer, solving
from shoal.plan.rates import capped_rates
from shoal.plan.spec import Problem

Objective = Literal["latency", "response", "throughput", "pareto"]
"""latency: seconds per token of the workload's sessions. response: seconds per request, at
the workload's rate if it has one. throughput: tokens per second of as many sessions as fit.
pareto: the placements of which none is better in both latency and throughput."""

OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)

SERVERS_MAX: Final = {"latency": 80, "petals": 150, "waterfill": 250, "gbpcr": 400}
"""Rules that take long beyond so many servers are not tried there."""

FRONT_SERVERS_MAX: Final = 200
"""Beyond so many, the front is made of the rules' placements alone."""

SOLVED_SERVERS_MAX: Final = 8
SOLVED_BLOCKS_MAX: Final = 32
"""The exact rule is tried up to this size: beyond it seldom comes to an end."""

LINKED: Final = "anneal on links"
"""Annealed for what gets through where ways between servers have rates."""

LAST_SHARE: Final = 0.8
"""Of the time that is left, for the last rule: its moves take about as long as its first score."""

LINKED_FLOW_SHARE: Final = 1 / 5

PRESENT: Final = "present"
"""What is now, among the rules tried."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long planning may take. Without a clock, as long as it takes."""

    moves_max: int = MOVES
    """Moves of the annealer."""
    limit_s: float = math.inf
    clock: Callable[[], float] | None = None
    started_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Seconds left."""
        if self.clock is None:
            return math.inf
        return self.limit_s - (self.clock() - self.started_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A rule, its placement and what that gives."""

    policy: str
    placement: Placement
    outlook: Outlook


def value_of(outlook: Outlook, objective: Objective) -> float:
    """The figure that an objective is about."""
    if objective == "throughput":
        return outlook.rows_per_s
    if objective == "response":
        return outlook.service_s if outlook.response_s is None else outlook.response_s[0]
    return outlook.step_s


def merit(outlook: Outlook, objective: Objective) -> tuple[float, ...]:
    """By what placements are compared; less is better. Of equals, who has more room, and
    then more replicas."""
    value = value_of(outlook, objective)
    count = outlook.replicas
    room = (-outlook.requests_per_s_max, -outlook.rows_per_s, -min(count), -sum(count))
    if objective == "throughput":
        return (-value, outlook.step_s, *room)
    if objective == "response" and outlook.response_s is not None:
        return (value, *room)
    return (outlook.unplaced, value, *room)


class Trials:
    """What was tried so far: rules with their placements, rules that failed, rules left out."""

    def __init__(
        self, problem: Problem, objective: Objective, seed: int, budget: Budget, progress: Progress
    ) -> None:
        self.problem = problem
        self.objective = objective
        self.seed = seed
        self.budget = budget
        self.progress = progress
        self.rates = capped_rates(problem)
        self.tried: dict[Placement, Tried] = {}
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.solved_bound: float | None = None

    @property
    def currency(self) -> Currency:
        return "request" if self.objective == "response" else "token"

    @property
    def _has_rates(self) -> bool:
        return self.problem.links.server_bytes_per_s is not None

    def all(self, policy: str, present: Placement | None) -> None:
        """Try the present placement and the rules."""
        if policy != "auto":
            self._rule(policy, fills=False)
            return
        if present is not None and not uncovered(self.problem, present.spans):
            self._add(PRESENT, present, fills=False)
        steps = list(self._steps())
        for done, (name, step) in enumerate(steps):
            self.progress(f"planning: {name}", done, len(steps))
            if self.budget.left_s <= 0 and self.tried:
                self.skipped.append(name)
            else:
                step()
        self.progress("planned", len(steps), len(steps))

    def bound(self) -> float:
        """What nothing can beat."""
        if self.objective == "throughput":
            bound = throughput_bound(self.problem, self.rates)
            return bound if self.solved_bound is None else min(bound, self.solved_bound)
        problem = self.problem
        if self.objective == "response" and problem.workload.requests_per_s:
            # Requests come from all clients, however few sessions there are at a time.
            workload = replace(problem.workload, sessions=problem.num_clients)
            problem = replace(problem, workload=workload)
        bound = request_bound_s(problem, currency=self.currency)
        return bound if self.solved_bound is None else max(bound, self.solved_bound)

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        count = len(self.problem.servers)
        for name in ("whole", "cgbp-sweep", "gbpcr", "waterfill", "latency", "petals"):
            if count <= SERVERS_MAX.get(name, count):
                yield name, partial(self._rule, name)
        is_solvable = importlib.util.find_spec("scipy") is not None
        if self.objective in ("throughput", "pareto") and is_solvable:
            yield "flow", self._flow
        if self.objective == "pareto" and count <= FRONT_SERVERS_MAX:
            yield "cgbp and gbpcr for other numbers of sessions", self._sweep
        if self.objective != "throughput":
            yield "anneal", self._anneal
        if self.objective in ("throughput", "pareto") and self._has_rates:
            yield LINKED, self._anneal_on_links
        is_small = count <= SOLVED_SERVERS_MAX and self.problem.num_blocks <= SOLVED_BLOCKS_MAX
        is_hub = self.problem.links.flow == "hub"
        if self.objective in ("latency", "response") and is_small and is_hub and is_solvable:
            yield "milp", self._milp

    def _rule(self, name: str, *, fills: bool = True) -> None:
        rule = placer(name)
        try:
            self._add(name, rule(self.problem, random.Random(self.seed)), fills=fills)
        except NoRouteError as error:
            self.failed[name] = error.detail

    def _add(self, name: str, placement: Placement, *, fills: bool = True) -> None:
        options = {name: placement}
        if fills and placement.cache_bytes is None:  # Petals' caches stay as they are
            options[f"{name} + replicas"] = self._filled(placement)
        for policy, one in options.items():
            if one not in self.tried and fits(self.problem, one):
                outlook = look_ahead(self.problem, one, self.rates)
                self.tried[one] = Tried(policy=policy, placement=one, outlook=outlook)

    def _filled(self, placement: Placement) -> Placement:
        """With memory that is left used for replicas: nobody's way gets longer by that.

        Idle servers go where replicas are fewest; others host more blocks before their own,
        which sessions need not run.
        """
        sessions = self.problem.workload.sessions
        count = replicas(self.problem, placement)
        spans = list(placement.spans)
        for server, span in enumerate(spans):
            size = self.problem.blocks_max(server, sessions)
            if not size or (span is not None and size <= len(span)):
                continue
            wider = choose_span(count, size) if span is None else _before(span, size)
            for block in range(wider.start, wider.end if span is None else span.start):
                count[block] += 1
            spans[server] = wider
        return replace(placement, spans=tuple(spans))

    def _best(self) -> Tried:
        return min(self.tried.values(), key=lambda one: merit(one.outlook, self.objective))

    def _anneal(self) -> None:
        score = scorer(self.problem, currency=self.currency)
        start = cgbp(self.problem, self.problem.workload.sessions)
        if self.tried:
            start = min(self.tried, key=lambda one: (score(one), self.tried[one].policy))
        most = min(self.budget.moves_max, MOVES_SERVERS // len(self.problem.servers))
        self._annealed("anneal", score, start, most, self.budget.left_s / 2)

    def _anneal_on_links(self) -> None:
        """From the placement that gets most rows through so far: rules know no rates of ways."""
        found = [one for one in self.tried.values() if one.outlook.rows_per_s]
        if not found:
            self.failed[LINKED] = "no rule's placement lets a row through the links to start from"
            return
        start = min(found, key=lambda one: merit(one.outlook, "throughput"))
        linked = solving("shoal.plan.over_links", f"{LINKED} needs")
        score = linked.link_scorer(self.problem, self.rates)
        left_s = self.budget.left_s * LAST_SHARE
        self._annealed(LINKED, score, start.placement, self.budget.moves_max, left_s)

    def _annealed(
        self, name: str, score: Scorer, start: Placement, moves: int, limit_s: float
    ) -> None:
        if self.budget.clock is not None:
            before_s = self.budget.clock()
            score(start)
            each_s = max(self.budget.clock() - before_s, 1e-6)
            moves = min(moves, max(0, int(limit_s / each_s)))
        try:
            rng = random.Random(self.seed)
            found = place_anneal(self.problem, rng, score=score, moves=moves, start=start)
            self._add(name, found)
        except NoRouteError as error:
            self.failed[name] = error.detail

    def _sweep(self) -> None:
        """What the front is made of: few sessions mean short chains, many mean much cache."""
        sessions = self.problem.workload.sessions
        most = max(4 * sessions, 32)
        numbers = sorted({1 + most * step // SWEEP_MAX for step in range(SWEEP_MAX)})
        for number in numbers:
            for name, rule in (("cgbp", cgbp), ("gbpcr", gbpcr)):
                try:
                    placement = covering(self.problem, rule(self.problem, number))
                except NoRouteError:
                    continue  # so many sessions are too many; others are tried as well
                self._add(f"{name} for {number}", placement)

    def _flow(self) -> None:
        flow = importlib.import_module("shoal.plan.place.flow")
        limit_s = None
        if self.budget.clock is not None:
            # Where ways limit its placement is only one to begin with.
            share = LINKED_FLOW_SHARE if self._has_rates else 1 / 2
            if self.objective == "throughput" and not self._has_rates:
                share = LAST_SHARE
            limit_s = max(1.0, self.budget.left_s * share)
        try:
            found = flow.plan_flow(self.problem, rates=self.rates, limit_s=limit_s)
        except NoRouteError as error:
            self.failed["flow"] = error.detail
            return
        if self.objective == "throughput" and not self._has_rates:
            # Over links servers share their time between runs of some of their blocks, which
            # the solver leaves out: its bound is none then.
            self.solved_bound = found.bound
        self._add("flow", found.placement)

    def _milp(self) -> None:
        milp = importlib.import_module("shoal.plan.place.milp")
        limit_s = min(milp.LIMIT_S, max(1.0, self.budget.left_s))
        try:
            found = milp.plan_milp(self.problem, currency=self.currency, limit_s=limit_s)
        except (NoRouteError, ConfigError) as error:
            self.failed["milp"] = error.detail
            return
        if self.problem.workload.requests_per_s == 0 or self.objective == "latency":
            self.solved_bound = found.bound
        self._add("milp", found.placement)


def _before(span: Span, size: int) -> Span:
    """As many of `size` blocks as there are, up to the end of `span`."""
    return Span(max(0, span.end - size), span.end)
