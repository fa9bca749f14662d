"""Simulated annealing of all spans, from the best of the quick rules.

Own work; moves and temperatures as measured in our study of tight memory: on small cases
within a few per cent of the optimum, on large ones the best known to us.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.plan.compose import Score, Scorer, scorer
from shoal.plan.place.cgbp import cgbp, place_cgbp_sweep
from shoal.plan.place.gbpcr import place_gbpcr
from shoal.plan.place.waterfill import place_waterfill
from shoal.plan.place.whole import place_whole
from shoal.plan.placement import Placement, Placer, covering
from shoal.plan.spec import Problem

MOVES: Final = 8000
"""Moves for up to 16 servers, as in the study,"""

MOVES_SERVERS: Final = 60_000
"""and beyond so many divided by the number of servers: a move costs that much more."""

HEAT: Final = 0.005
"""Starting temperature as a share of the starting score; it falls to 0 in a line. Of 5 % to
0 % half a per cent was best on tight memory with 12 servers, and near it with 60."""

STARTS: Final[tuple[Placer, ...]] = (place_cgbp_sweep, place_gbpcr, place_waterfill, place_whole)

_Spans = list[Span | None]
_Move = Callable[["_Annealer", _Spans], None]


def place_anneal(
    problem: Problem,
    rng: random.Random,
    *,
    score: Scorer | None = None,
    moves: int | None = None,
    start: Placement | None = None,
) -> Placement:
    """The best placement met on the way; never worse by its score than where it started.

    Starts from `start`, or from the best of CG-BP with its sweep, GBP-CR, water-filling and
    whole models. 0 moves only choose among those.

    Raises:
        NoRouteError: it met no placement that covers all blocks.
    """
    score = score or scorer(problem)
    if start is None:
        start = min(_starts(problem, rng), key=score)
    if moves is None:
        moves = min(MOVES, MOVES_SERVERS // max(1, len(problem.servers)))
    return covering(problem, _Annealer(score, rng).run(start, moves))


def _starts(problem: Problem, rng: random.Random) -> list[Placement]:
    found = [cgbp(problem, problem.workload.sessions)]
    for placer in STARTS:
        try:
            found.append(placer(problem, rng))
        except NoRouteError:
            continue  # This rule can't cover it; annealing from another may.
    return found


class _Annealer:
    """One run; see the module's docstring."""

    def __init__(self, score: Scorer, rng: random.Random) -> None:
        self.problem = score.problem
        self.score = score
        self.rng = rng
        self.sizes = [
            self.problem.blocks_max(server, 1) for server in range(len(self.problem.servers))
        ]
        self.usable = [server for server, size in enumerate(self.sizes) if size]

    def run(self, start: Placement, moves: int) -> Placement:
        best, best_score = start, self.score(start)
        if not self.usable:
            return best
        now, now_score = best, best_score
        heat_s = HEAT * best_score.seconds
        kinds: Sequence[_Move] = (_shift, _snap, _resize, _swap)
        for step in range(moves):
            spans = list(now.spans)
            (kind,) = self.rng.choices(kinds, weights=(35, 25, 25, 15))
            kind(self, spans)
            if tuple(spans) == now.spans:
                continue
            new = Placement(spans=tuple(spans))
            new_score = self.score(new)
            if self._accepts(now_score, new_score, heat_s * (1 - step / moves)):
                now, now_score = new, new_score
                if now_score < best_score:
                    best, best_score = now, now_score
        return best

    def _accepts(self, now: Score, new: Score, heat_s: float) -> bool:
        if new[:2] != now[:2]:
            return new < now
        worse_s = new.seconds - now.seconds
        return worse_s <= 0 or (heat_s > 0 and self.rng.random() < math.exp(-worse_s / heat_s))

    def size_now(self, spans: _Spans, server: int) -> int:
        span = spans[server]
        return self.sizes[server] if span is None else len(span)

    def put(self, spans: _Spans, server: int, start: int, size: int) -> None:
        """Host `size` blocks from about `start`, as far as both are possible."""
        size = max(1, min(size, self.sizes[server]))
        start = max(0, min(start, self.problem.num_blocks - size))
        spans[server] = Span(start, start + size)


def _shift(run: _Annealer, spans: _Spans) -> None:
    """One server anywhere."""
    server = run.rng.choice(run.usable)
    size = run.size_now(spans, server)
    run.put(spans, server, run.rng.randint(0, run.problem.num_blocks - size), size)


def _snap(run: _Annealer, spans: _Spans) -> None:
    """One server to an edge of another."""
    server, other = run.rng.choice(run.usable), run.rng.choice(run.usable)
    edge = spans[other]
    if edge is None or other == server:
        return
    size = run.size_now(spans, server)
    border = run.rng.choice((edge.start, edge.end))
    run.put(spans, server, run.rng.choice((border, border - size)), size)


def _resize(run: _Annealer, spans: _Spans) -> None:
    """One server longer or shorter by up to 3 blocks, at either end."""
    server = run.rng.choice(run.usable)
    size = run.size_now(spans, server)
    span = spans[server]
    more = run.rng.choice((-3, -2, -1, 1, 2, 3))
    start = 0 if span is None else span.start
    if run.rng.random() < 0.5:
        start -= more
    run.put(spans, server, start, size + more)


def _swap(run: _Annealer, spans: _Spans) -> None:
    """Two servers take each other's start."""
    one, two = run.rng.choice(run.usable), run.rng.choice(run.usable)
    first, second = spans[one], spans[two]
    if first is None or second is None:
        return
    run.put(spans, one, second.start, len(first))
    run.put(spans, two, first.start, len(second))
