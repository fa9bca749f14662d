"""The cheapest way over a range of blocks: the search behind routing and repair.

Not here: which servers are allowed (the callers filter), and what is done when there
is no way. Start with `Leg` (what one hop costs) and `cheapest_path`.

The path is found border by border, and any border may be a change of servers. At each we
know, for each server, the cheapest way to *be in it* and the cheapest way to have *just
left it*; that is all the future depends on. 1,000 servers and 126 blocks take about 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.view import Stage


class Cost(NamedTuple):
    """What a path costs; compared from the first field to the last."""

    avoided: int
    """Hops on peers that are to be avoided."""
    rebuilt: int
    """Hops that live and yet lose their place."""
    crossed: int
    """Hops of another numerics class than wanted."""
    leaving: int
    """Hops on servers that drain: each means a repair soon."""
    seconds: float
    """Predicted time of one decode step."""


FREE = Cost(0, 0, 0, 0, 0.0)


def add(one: Cost, other: Cost) -> Cost:
    """The sum, field by field."""
    return Cost(
        one.avoided + other.avoided,
        one.rebuilt + other.rebuilt,
        one.crossed + other.crossed,
        one.leaving + other.leaving,
        one.seconds + other.seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A server that may be a hop: its blocks, and what using it costs."""

    peer: PeerId
    span: Span
    entry: Cost
    """Paid once per hop, whatever it runs."""
    seconds_per_block: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to find a path over."""

    span: Span
    """The blocks to cover, exactly."""
    kept: tuple[Stage, ...] = ()
    """Hops that should stay as they are, inside `span`, disjoint, in order."""
    slow_pairs: frozenset[tuple[PeerId, PeerId]] = frozenset()
    """(sender, receiver) pairs whose link costs `slow_pair_s` more."""
    slow_pair_s: float = 0.0


class _Way(NamedTuple):
    """A partial path: its last hop runs [start, ...) on `peer`."""

    cost: Cost
    peer: PeerId
    start: int
    end: int
    before: _Way | None
    is_kept: bool = False


def cheapest_path(task: Task, legs: Iterable[Leg]) -> tuple[Stage, ...] | None:
    """The cheapest stages that cover `task.span` exactly, or None.

    Two adjacent stages are never on one peer, unless one of them is kept: a kept hop may be
    extended by its own server, which hands rows on to itself. Peers of `legs` are unique.
    Ties go to the leg that comes first, so the answer depends on nothing but the arguments.
    """
    return _Search(task, tuple(legs)).run()


class _Search:
    """One run of the search; see the module's docstring."""

    def __init__(self, task: Task, legs: tuple[Leg, ...]) -> None:
        self.task = task
        self.legs = legs
        self.kept = {stage.span.start: stage for stage in task.kept}
        self.left: dict[int, dict[PeerId, _Way]] = {}
        """By border: the cheapest way that ends there, by the peer of its last hop."""
        self.inside: dict[PeerId, _Way] = {}
        """The cheapest way to be in a server at the current border."""

    def run(self) -> tuple[Stage, ...] | None:
        for border in range(self.task.span.start, self.task.span.end):
            self._enter(border)
            self._ride(Span(border, border + 1))
        ends = self.left.get(self.task.span.end, {})
        if not ends:
            return None
        return _stages(min(ends.values(), key=_cost_of))

    def _enter(self, border: int) -> None:
        """Take every step that can be taken at `border`: keep a hop, enter a server."""
        ways = sorted(self.left.pop(border, {}).values(), key=_cost_of)
        stage = self.kept.get(border)
        if stage is not None:
            self._keep(stage, ways)
            self.inside = {
                peer: way._replace(cost=way.cost._replace(rebuilt=way.cost.rebuilt + 1))
                for peer, way in self.inside.items()
            }
        fee = FREE if stage is None else FREE._replace(rebuilt=1)
        for leg in self.legs:
            if leg.span.start <= border < leg.span.end:
                self._enter_leg(leg, ways, border, fee)

    def _keep(self, stage: Stage, ways: Sequence[_Way]) -> None:
        found = self._best_before(stage.peer, ways, stage.span.start, is_kept=True)
        if found is not None:
            cost, before = found
            span = stage.span
            self._leave(_Way(cost, stage.peer, span.start, span.end, before, is_kept=True))

    def _enter_leg(self, leg: Leg, ways: Sequence[_Way], border: int, fee: Cost) -> None:
        found = self._best_before(leg.peer, ways, border, is_kept=False)
        if found is None:
            return
        cost, before = found
        cost = add(add(cost, leg.entry), fee)
        riding = self.inside.get(leg.peer)
        if riding is None or cost < riding.cost:
            self.inside[leg.peer] = _Way(cost, leg.peer, border, border, before)

    def _best_before(
        self, peer: PeerId, ways: Sequence[_Way], border: int, *, is_kept: bool
    ) -> tuple[Cost, _Way | None] | None:
        """The cheapest way (of `ways`, cheapest first) that `peer` can follow on."""
        if border == self.task.span.start:
            return FREE, None
        best: tuple[Cost, _Way | None] | None = None
        for way in ways:
            if best is not None and best[0] <= way.cost:
                break
            if way.peer == peer and not (is_kept or way.is_kept):
                continue
            cost = way.cost
            if (way.peer, peer) in self.task.slow_pairs:
                cost = cost._replace(seconds=cost.seconds + self.task.slow_pair_s)
            if best is None or cost < best[0]:
                best = cost, way
        return best

    def _ride(self, step: Span) -> None:
        """Let every server that can run `step`; each may be left behind it."""
        moved: dict[PeerId, _Way] = {}
        for leg in self.legs:
            way = self.inside.get(leg.peer)
            if way is None or not leg.span.covers(step):
                continue
            seconds = way.cost.seconds + leg.seconds_per_block * len(step)
            way = way._replace(cost=way.cost._replace(seconds=seconds), end=step.end)
            moved[leg.peer] = way
            self._leave(way)
        self.inside = moved

    def _leave(self, way: _Way) -> None:
        ends = self.left.setdefault(way.end, {})
        known = ends.get(way.peer)
        if known is None or way.cost < known.cost:
            ends[way.peer] = way


def _cost_of(way: _Way) -> Cost:
    return way.cost


def _stages(way: _Way | None) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    while way is not None:
        stages.append(Stage(peer=way.peer, span=Span(way.start, way.end)))
        way = way.before
    return tuple(reversed(stages))
