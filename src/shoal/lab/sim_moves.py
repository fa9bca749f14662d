"""Who moves when servers come and go: the rules of `shoal.plan` by name, in one shape.

Nothing is decided here. Each mover hands a placement to a rule and returns where servers
should go; the simulations load, wait and serve accordingly.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.lab.sim_scenario import Scenario, place_among
from shoal.plan import petals
from shoal.plan.place import latency
from shoal.plan.place.petals import hosting, petals_blocks, petals_cache_bytes
from shoal.plan.placement import Placement
from shoal.plan.spec import Problem

Targets = Mapping[int, Span]
"""By server: where it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who is where, those that still load included, and what is going on."""

    placement: Placement
    present: frozenset[int]
    """Servers that are there, whether they host something or not."""
    running: int = 0
    """Sessions that run."""


class Mover(Protocol):
    """A rule of moving. All are asked with a layout in which nobody is where it is not."""

    def joined(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """A server came (it is present and hosts nothing): where to, and who moves for it."""

    def left(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """A server is gone: who moves for it."""

    def checked(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """A server asks whether it should move."""


def mover(scenario: Scenario) -> Mover:
    """The scenario's rule of moving.

    Raises:
        ConfigError: there is none of that name.
    """
    rule = scenario.moves.rule
    if rule not in MOVERS:
        raise ConfigError(f"no rule of moving is called {rule!r} (choose {', '.join(MOVERS)})")
    return MOVERS[rule](scenario)


class _Stay:
    """Nobody moves. Who joins takes the blocks it was given, or what the placer gives it."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    def joined(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Where it belongs."""
        given = self._scenario.placement
        span = given.spans[server] if given is not None else None
        if span is None:
            span = _among(self._scenario, layout, rng).spans[server]
        return {} if span is None else {server: span}

    def left(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Nobody."""
        return {}

    def checked(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Never."""
        return {}


class _Replace:
    """The placer places all anew whenever somebody comes or goes."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    def joined(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Everybody to the new placement."""
        return self._changed(layout, rng)

    def left(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Everybody to the new placement."""
        return self._changed(layout, rng)

    def checked(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Never in between."""
        return {}

    def _changed(self, layout: Layout, rng: random.Random) -> Targets:
        new = _among(self._scenario, layout, rng)
        return {one: span for one, span in new.hosted() if span != layout.placement.spans[one]}


class _Petals:
    """`shoal.plan.petals`: rows per second of each block."""

    def __init__(self, scenario: Scenario) -> None:
        self._problem = scenario.problem

    def joined(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Where rows per second are fewest."""
        num_blocks = petals_blocks(self._problem, server)
        if not num_blocks:
            return {}
        hostings = [one for _, one in self._hostings(layout)]
        throughputs = petals.block_throughputs(hostings, self._problem.num_blocks)
        return {server: petals.choose_span(throughputs, num_blocks)}

    def left(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Nobody at once: servers find out when they check."""
        return {}

    def checked(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """The published check."""
        hosted = self._hostings(layout)
        mine = [index for index, (one, _) in enumerate(hosted) if one == server]
        if not mine:
            return {}
        hostings = [one for _, one in hosted]
        span = petals.choose_move(hostings, mine[0], self._problem.num_blocks, rng)
        return {} if span is None else {server: span}

    def _hostings(self, layout: Layout) -> list[tuple[int, petals.Hosting]]:
        return [
            (server, hosting(self._problem, server, span))
            for server, span in layout.placement.hosted()
        ]


class _Latency:
    """`shoal.plan.place.latency` as live servers have it: mean response time, blocks in danger,
    and the cost of moving."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._problem = scenario.problem
        self._goal = latency.careful_goal(self._problem, currency="request")

    def joined(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Where responses get shortest."""
        num_blocks = self._problem.blocks_max(server, self._problem.workload.sessions)
        if not num_blocks:
            return {}
        return {server: latency.choose_join(self._goal, layout.placement, server, num_blocks)}

    def left(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """Nobody at once."""
        return {}

    def checked(self, layout: Layout, server: int, rng: random.Random) -> Targets:
        """The best response, if it pays for the reload."""
        span = layout.placement.spans[server]
        if span is None:
            return {}
        moves = self._scenario.moves
        switch = latency.SwitchCost(
            reload_s=moves.reload.seconds(server, self._problem.weight_bytes(span)),
            sessions_now=layout.running,
            sessions_per_s=self._problem.workload.requests_per_s,
            horizon_s=moves.horizon_s,
        )
        target = latency.choose_move(self._goal, layout.placement, server, switch)
        return {} if target is None else {server: target}


class _MoverMaker(Protocol):
    def __call__(self, scenario: Scenario) -> Mover: ...


MOVERS: Final[dict[str, _MoverMaker]] = {
    "stay": _Stay,
    "replace": _Replace,
    "petals": _Petals,
    "latency": _Latency,
}
"""Rules of moving by name."""


def moved(problem: Problem, placement: Placement, server: int, span: Span | None) -> Placement:
    """The placement with one server elsewhere; fixed caches (Petals) go with the blocks."""
    after = placement.moved(server, span)
    if after.cache_bytes is None:
        return after
    caches = list(after.cache_bytes)
    caches[server] = 0 if span is None else petals_cache_bytes(problem, span)
    return replace(after, cache_bytes=tuple(caches))


def _among(scenario: Scenario, layout: Layout, rng: random.Random) -> Placement:
    """The placer's answer for those that are there; where they are, if it has none."""
    try:
        return place_among(scenario.problem, sorted(layout.present), scenario.placer, rng)
    except NoRouteError:
        return layout.placement
