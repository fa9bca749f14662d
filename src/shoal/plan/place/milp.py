"""The exact placement for small swarms: windows and boundaries, without big M.

Own form of the problem of BPRR (arXiv 2512.21884, eq. 13): a server chooses one window;
the sessions of a client flow over block boundaries through the windows. Its linear
relaxation is tight, and its size does not depend on the number of sessions: 10 to 100
times faster than the published form (`shoal.plan.place.bigm`), with the same optimum.

Where sessions may leave a span anywhere (`Problem.exits`) its size is smaller still, and
its optimum at most that of the published rule. Hub prices only: with push a hop's price
depends on the one before it, for which this form has no variables.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.cost import Currency, Prices, prices
from shoal.plan.place.program import Program, Solution
from shoal.plan.placement import Placement, covering
from shoal.plan.spec import Problem

SpansOf = Callable[[Sequence[float]], Sequence[Span | None]]
"""The spans, by server, that the values of a program's variables stand for."""

LIMIT_S: Final = 25.0
"""Time for the solver. 8 servers and 24 blocks are usually proven within it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A placement with what is known of its quality, in seconds per session."""

    placement: Placement
    seconds: float
    """Mean over all sessions if they take the chains of the plan."""
    bound: float
    """No placement is better than this."""
    gap: float
    """How far `seconds` may be above the optimum, as a share of it."""


def place_milp(problem: Problem, rng: random.Random) -> Placement:
    """The placement that `plan_milp` finds within `LIMIT_S`.

    Raises:
        NoRouteError: there is none, or it found none in time.
        ConfigError: push prices, or far too large.
    """
    return plan_milp(problem).placement


def plan_milp(
    problem: Problem,
    *,
    currency: Currency = "token",
    limit_s: float | None = LIMIT_S,
    branches_max: int | None = None,
) -> Planned:
    """The placement with the least mean price over all the workload's sessions.

    Sessions are shared out evenly over the clients. For the limits see `Program.solve`.

    Raises:
        NoRouteError, ConfigError: see `place_milp`.
    """
    program = _Windows(problem, currency)
    return planned(
        problem, program.program.solve(limit_s=limit_s, branches_max=branches_max), program.spans
    )


def planned(problem: Problem, solution: Solution, spans_of: SpansOf) -> Planned:
    """A solution as a placement.

    Raises:
        NoRouteError: there is no solution.
    """
    if not solution.values:
        why = (
            "none exists"
            if solution.bound == math.inf
            else "the solver found none within its limit"
        )
        raise NoRouteError(
            f"no placement seats all {problem.workload.sessions} sessions at once: {why} "
            "(plan for fewer or shorter sessions, or use another rule)"
        )
    sessions = problem.workload.sessions
    return Planned(
        placement=covering(problem, Placement(spans=tuple(spans_of(solution.values)))),
        seconds=solution.objective / sessions,
        bound=solution.bound / sessions,
        gap=solution.gap,
    )


@dataclass(slots=True)
class _Server:
    """The variables of one server."""

    windows: dict[Span, int] = field(default_factory=dict)
    runs: list[tuple[int, Span, int]] = field(default_factory=list)
    """(client, span that is run, variable)."""


class _Windows:
    """The program; see the module's docstring."""

    def __init__(self, problem: Problem, currency: Currency) -> None:
        self.problem = problem
        self.program = Program()
        each = [prices(problem, client, currency) for client in range(problem.num_clients)]
        if each[0].between is not None:
            raise ConfigError("the exact rule plans for hub prices only (use anneal for push)")
        self.counts = problem.shares(problem.workload.sessions)
        self.servers = [_Server() for _ in problem.servers]
        for server in range(len(self.servers)):
            self._add_windows(server)
            if problem.exits == "end":
                self._add_runs_to_end(server, each)
            else:
                self._add_runs(server, each)
            self._add_memory(server)
        self._add_conservation()

    def spans(self, values: Sequence[float]) -> list[Span | None]:
        """By server: the window that was chosen."""
        return [
            next((span for span, var in one.windows.items() if values[var] > 0.5), None)
            for one in self.servers
        ]

    def _add_windows(self, server: int) -> None:
        windows = self.servers[server].windows
        for start in range(self.problem.num_blocks):
            for end in range(start + 1, self.problem.num_blocks + 1):
                if not self.problem.can_host(server, Span(start, end)):
                    break
                windows[Span(start, end)] = self.program.variable(high=1, integer=True)
        self.program.row(dict.fromkeys(windows.values(), 1.0), high=1)

    def _add_runs(self, server: int, each: list[Prices]) -> None:
        """Runs of any part of the window that the server has."""
        one = self.servers[server]
        for part in one.windows:
            inside = [var for span, var in one.windows.items() if span.covers(part)]
            for client, count in enumerate(self.counts):
                if count:
                    run = self._run(server, client, part, each[client])
                    terms = dict.fromkeys(inside, -float(count))
                    self.program.row({run: 1.0, **terms}, high=0)

    def _add_runs_to_end(self, server: int, each: list[Prices]) -> None:
        """Runs to the end of the window that the server has, from anywhere in it."""
        one = self.servers[server]
        for window, var in one.windows.items():
            for client, count in enumerate(self.counts):
                if not count:
                    continue
                starts = range(window.start, window.end)
                runs = [
                    self._run(server, client, Span(start, window.end), each[client])
                    for start in starts
                ]
                self.program.row({**dict.fromkeys(runs, 1.0), var: -float(count)}, high=0)

    def _run(self, server: int, client: int, part: Span, price: Prices) -> int:
        seconds = price.arrive[server] + price.block[server] * len(part)
        run = self.program.variable(cost=seconds, high=self.counts[client], integer=True)
        self.servers[server].runs.append((client, part, run))
        return run

    def _add_memory(self, server: int) -> None:
        """Weights and caches, as shares of the server's memory: sums near 1 solve best."""
        one, memory = self.servers[server], self.problem.servers[server].memory_bytes
        terms: dict[int, float] = {}
        for span, var in one.windows.items():
            terms[var] = self.problem.weight_bytes(span) / memory
        for _, part, run in one.runs:
            terms[run] = self.problem.session_bytes(part) / memory
        if terms:
            self.program.row(terms, high=1)

    def _add_conservation(self) -> None:
        """What comes to a boundary leaves it; all sessions start at 0 and end at the last."""
        last = self.problem.num_blocks
        for client, count in enumerate(self.counts):
            borders: list[dict[int, float]] = [{} for _ in range(last + 1)]
            for one in self.servers:
                for owner, part, run in one.runs:
                    if owner == client:
                        borders[part.start][run] = 1.0
                        borders[part.end][run] = -1.0
            for border, terms in enumerate(borders):
                net = count * (int(border == 0) - int(border == last))
                self.program.row(terms, low=net, high=net)
