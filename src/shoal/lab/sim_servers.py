"""The servers of a simulation: who is there, who serves what, who loads, who checks.

Shared by fidelities B and C, which differ in what it means to serve. Where servers go is
decided by the rules behind `sim_moves`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any, Final, Protocol

from shoal.base.spans import Span
from shoal.lab.sim_moves import Layout, Targets, moved, mover
from shoal.lab.sim_scenario import Event, Scenario, start_placement
from shoal.plan.change import change_between
from shoal.plan.placement import Placement, uncovered

IDLE_CHECKS_MAX: Final = 4
"""Checks per server after which a swarm in which nothing else happens counts as at its end."""


class Host(Protocol):
    """The simulation around the servers."""

    @property
    def scenario(self) -> Scenario:
        """What is simulated."""

    @property
    def now_s(self) -> float:
        """The scenario's time."""

    @property
    def running(self) -> int:
        """Sessions that run."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to happen any more."""

    def at(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen."""

    def change(self, loaded: Placement, event: Event | None) -> None:
        """Servers serve other blocks from now on, by this event or because they moved."""


class Servers:
    """The servers: who is there, who serves what, who loads."""

    def __init__(self, host: Host) -> None:
        self._host = host
        scenario = host.scenario
        self.problem = scenario.problem
        self.present = set(scenario.present)
        self.planned = self.loaded = start_placement(scenario)
        """Where all are or will be, and what is served now."""
        self.history = [(0.0, self.loaded)]
        self.outage_s = 0.0
        self.moves = 0
        self.reload_bytes = 0
        self._mover = mover(scenario)
        self._rng = random.Random(scenario.seed + 1)
        self._loading: dict[int, int] = {}
        """By server: the number of the load that counts."""
        self._cut: dict[int, Span | None] = {}
        """Servers that nobody reaches, with what they serve."""
        self._numbers = itertools.count()
        self._idle_checks = 0
        self._to_come = len(scenario.events)
        self._since_s = 0.0

    def start(self) -> None:
        """Let the scenario's events come, and checks."""
        for event in self._host.scenario.events:
            self._host.at(event.at_s, self._happen, event)
        if math.isfinite(self._host.scenario.moves.check_every_s):
            self._host.at(self._next_check_s(), self._check)

    @property
    def is_expecting(self) -> bool:
        """Whether servers still come, go or load: outages count to the end of it."""
        return bool(self._loading or self._to_come)

    def pass_time(self, at_s: float) -> None:
        """Count how long blocks were without a server."""
        if uncovered(self.problem, self.loaded.spans):
            self.outage_s += at_s - self._since_s
        self._since_s = at_s

    def _happen(self, event: Event) -> None:
        """A server comes or goes."""
        server = event.server
        self._to_come -= 1
        if event.kind == "join":
            if server in self.present:
                return
            self.present.add(server)
            self._follow(self._mover.joined(self._layout(), server, self._rng))
            return
        if event.kind == "mend":
            self._mend(event)
            return
        if server not in self.present:
            return
        if event.kind == "cut":
            self._cut[server] = self.loaded.spans[server]
        self.present.discard(server)
        self._loading.pop(server, None)
        self.planned = moved(self.problem, self.planned, server, None)
        self._serve(server, None, event)
        self._follow(self._mover.left(self._layout(), server, self._rng))

    def _mend(self, event: Event) -> None:
        if event.server in self._cut:
            span = self._cut.pop(event.server)
            self.present.add(event.server)
            self.planned = moved(self.problem, self.planned, event.server, span)
            self._serve(event.server, span, event)

    def _layout(self) -> Layout:
        return Layout(
            placement=self.planned, present=frozenset(self.present), running=self._host.running
        )

    def _next_check_s(self) -> float:
        """Checks come at random, so often on average."""
        return self._host.now_s + self._rng.uniform(0, 2 * self._host.scenario.moves.check_every_s)

    def _check(self) -> None:
        hosted = [server for server, _ in self.planned.hosted() if server not in self._loading]
        if hosted:
            server = self._rng.choice(hosted)
            self._follow(self._mover.checked(self._layout(), server, self._rng))
        self._idle_checks = self._idle_checks + 1 if self._host.is_idle else 0
        if self._idle_checks <= IDLE_CHECKS_MAX * len(self.problem.servers):
            self._host.at(self._next_check_s(), self._check)

    def _follow(self, targets: Targets) -> None:
        """Servers go where a rule says: load, then serve."""
        scenario = self._host.scenario
        after = self.planned
        for server, span in targets.items():
            after = moved(self.problem, after, server, span)
        change = change_between(self.problem, self.planned, after)
        self.planned = after
        for move in change.moves:
            self.moves += move.before is not None
            self.reload_bytes += move.load_bytes
            number = self._loading[move.server] = next(self._numbers)
            if scenario.moves.is_down and move.before is not None:
                self._serve(move.server, None)
            delay_s = scenario.moves.reload.seconds(move.server, move.load_bytes)
            self._host.at(self._host.now_s + delay_s, self._loaded, move.server, move.after, number)

    def _loaded(self, server: int, span: Span | None, number: int) -> None:
        if self._loading.get(server) == number:
            del self._loading[server]
            self._serve(server, span)

    def _serve(self, server: int, span: Span | None, event: Event | None = None) -> None:
        if self.loaded.spans[server] != span:
            self.pass_time(self._host.now_s)
            self.loaded = moved(self.problem, self.loaded, server, span)
            self.history.append((self._host.now_s, self.loaded))
            self._host.change(self.loaded, event)
