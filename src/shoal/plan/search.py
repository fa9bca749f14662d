"""The cheapest chain through a placement: the search behind planned and simulated routing.

Whether a session runs to the end of each span that it enters is a matter of the problem
(`Problem.exits`). `shoal.plan.shortest` is the search of the live router, which also
weighs things that are no times (draining servers, hops to keep); with hub prices and
exits anywhere both find the same chains, and a test says so.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from shoal.base.spans import Span
from shoal.plan.cost import Chain, Hop, Prices, hop_s
from shoal.plan.placement import Placement
from shoal.plan.spec import Exits, Problem

Extra = Callable[[Span], float]
"""Seconds on top of running a span at one server; infinite: not possible now."""


class Found(NamedTuple):
    """A chain and its price with all extras, in seconds."""

    seconds: float
    chain: Chain


_Entry = tuple[float, int, int]
"""A run: price of its blocks (with hub prices also of getting there), server, bytes."""


class _Way(NamedTuple):
    """The cheapest partial chain whose last hop runs [start, end) at `server`."""

    seconds: float
    server: int
    start: int
    end: int
    before: _Way | None


class Search:
    """All ways through one placement at given prices; built once, asked often."""

    def __init__(
        self,
        problem: Problem,
        placement: Placement,
        prices: Prices,
        exits: Exits | None = None,
    ) -> None:
        exits = exits or problem.exits
        self._problem, self._placement, self._exits = problem, placement, exits
        self._prices = prices
        self._num_blocks = problem.num_blocks
        self._is_hub = prices.between is None
        self._nearest = _nearest(prices.between)
        self._entries: list[dict[int, list[_Entry]]] = [{} for _ in range(problem.num_blocks)]
        """By border: the runs that start there, by where they end, the cheapest first."""
        hosted = placement.hosted()
        starts = {0, *(span.end for _, span in hosted)}
        if exits == "anywhere":
            starts = set(range(problem.num_blocks))
        ordered = sorted(starts)
        for server, span in hosted:
            block = prices.block[server]
            arrive = prices.arrive[server] if self._is_hub else 0.0
            low, high = bisect_left(ordered, span.start), bisect_left(ordered, span.end)
            for start in ordered[low:high]:
                for end in range(span.end if exits == "end" else start + 1, span.end + 1):
                    need = problem.run_bytes(start, end)
                    entry = (hop_s(arrive, block, end - start), server, need)
                    self._entries[start].setdefault(end, []).append(entry)
        for ends in self._entries:
            for entries in ends.values():
                if len(entries) > 1:
                    entries.sort()

    def at(self, prices: Prices) -> Search:
        """The same ways for another client. Pushing, that is quick: only ends are priced anew.

        Blocks, and ways between servers, must cost the same for both; else a new search is made.
        """
        own = self._prices
        if self._is_hub or (prices.block, prices.between) != (own.block, own.between):
            return Search(self._problem, self._placement, prices, self._exits)
        other = copy.copy(self)
        other._prices = prices
        return other

    def cheapest(
        self,
        *,
        room: Sequence[int] | None = None,
        extras: Sequence[Extra | None] | None = None,
    ) -> Found | None:
        """The cheapest chain over all blocks, or None.

        `room`: bytes by server; a run that needs more is not possible. `extras`: by server,
        None for none.
        """
        if self._is_hub:
            return self._cheapest_hub(room, extras)
        return self._cheapest_push(room, extras)

    def _cheapest_hub(
        self, room: Sequence[int] | None, extras: Sequence[Extra | None] | None
    ) -> Found | None:
        best = [math.inf] * (self._num_blocks + 1)
        best[0] = 0.0
        last = [(-1, -1)] * (self._num_blocks + 1)
        for start, ends in enumerate(self._entries):
            so_far = best[start]
            if so_far == math.inf:
                continue
            for end, entries in ends.items():
                least = best[end] - so_far
                for price, server, need in entries:
                    if price >= least:
                        break
                    if room is not None and need > room[server]:
                        continue
                    extra = None if extras is None else extras[server]
                    seconds = price if extra is None else price + extra(Span(start, end))
                    if seconds < least:
                        least = seconds
                        best[end], last[end] = so_far + seconds, (server, start)
        if best[-1] == math.inf:
            return None
        hops: list[Hop] = []
        border = self._num_blocks
        while border:
            server, start = last[border]
            if hops and hops[-1].server == server:
                # Rounding can make two runs on one server an ulp cheaper than one.
                border = hops.pop().span.end
            hops.append(Hop(server, Span(start, border)))
            border = start
        return Found(best[-1], tuple(reversed(hops)))

    def _cheapest_push(
        self, room: Sequence[int] | None, extras: Sequence[Extra | None] | None
    ) -> Found | None:
        ways: list[dict[int, _Way]] = [{} for _ in range(self._num_blocks + 1)]
        for start, ends in enumerate(self._entries):
            if not ends or (start and not ways[start]):
                continue
            before = sorted(ways[start].values(), key=lambda way: way.seconds)
            arrivals: dict[int, tuple[float, _Way | None]] = {}
            for end, (price, server, need) in _each(ends):
                if room is not None and need > room[server]:
                    continue
                if server not in arrivals:
                    arrivals[server] = self._arrive(server, before, is_first=not start)
                seconds, way = arrivals[server]
                seconds += price
                extra = None if extras is None else extras[server]
                if extra is not None:
                    seconds += extra(Span(start, end))
                known = ways[end].get(server)
                if seconds < math.inf and (known is None or seconds < known.seconds):
                    ways[end][server] = _Way(seconds, server, start, end, way)
        return self._best_way(ways[-1])

    def _arrive(
        self, server: int, before: Sequence[_Way], *, is_first: bool
    ) -> tuple[float, _Way | None]:
        """The cheapest way to be at a server, of the ways (cheapest first) to come from."""
        if is_first:
            return self._prices.arrive[server], None
        between = self._prices.between
        least = self._nearest[server]
        best: tuple[float, _Way | None] = (math.inf, None)
        for way in before:
            if way.seconds + least >= best[0]:
                break
            if way.server != server and between is not None:
                seconds = way.seconds + between[way.server][server]
                if seconds < best[0]:
                    best = seconds, way
        return best

    def _best_way(self, ends: dict[int, _Way]) -> Found | None:
        if not ends:
            return None
        leave = self._prices.leave
        final = min(ends.values(), key=lambda way: way.seconds + leave[way.server])
        hops: list[Hop] = []
        way: _Way | None = final
        while way is not None:
            hops.append(Hop(way.server, Span(way.start, way.end)))
            way = way.before
        return Found(final.seconds + leave[final.server], tuple(reversed(hops)))


def _nearest(between: Sequence[Sequence[float]] | None) -> list[float]:
    """By server: no way to it from another one is cheaper. Most ways need not be looked at."""
    if between is None:
        return []
    columns = enumerate(zip(*between, strict=True))
    return [
        min((price for sender, price in enumerate(column) if sender != server), default=0.0)
        for server, column in columns
    ]


def _each(ends: Mapping[int, Sequence[_Entry]]) -> Iterator[tuple[int, _Entry]]:
    return ((end, entry) for end, entries in ends.items() for entry in entries)
