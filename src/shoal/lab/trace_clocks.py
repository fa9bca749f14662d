"""Traces on one clock, and a part of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab.trace_reading import Timed, Trace
from shoal.server.events import Closed, Routed

SKEW_S: Final = 0.05
"""Clocks of machines that differ by more are set by the routes that both followed."""


def aligned(traces: Sequence[Trace]) -> list[Trace]:
    """On one clock: what two servers followed, they followed at about the same time."""
    if not traces:
        raise ConfigError("no traces: name at least one file")
    by_routes = sorted(traces, key=lambda trace: -len(route_times(trace)))
    known = dict(route_times(by_routes[0]))
    done = [by_routes[0]]
    for trace in by_routes[1:]:
        mine = route_times(trace)
        shifts = [known[key] - mine[key] for key in known.keys() & mine.keys()]
        by_s = median(shifts) if shifts else 0.0
        moved = trace.shifted(by_s) if abs(by_s) > SKEW_S else trace
        known = {**route_times(moved), **known}
        done.append(moved)
    return sorted(done, key=lambda trace: (trace.peer, trace.began.boot_s))


def route_times(trace: Trace) -> dict[tuple[str, int], float]:
    """When this server followed each route, by (session, epoch)."""
    times: dict[tuple[str, int], float] = {}
    for time_s, event in trace.events:
        if isinstance(event, Routed):
            times.setdefault((event.s, event.epoch), time_s)
    return times


def first_route_s(traces: Iterable[Trace]) -> float:
    """When the first of them was followed.

    Raises:
        ConfigError: there is none.
    """
    times = [time_s for trace in traces for time_s in route_times(trace).values()]
    if not times:
        raise ConfigError("the traces tell of no session: give those of the servers that had one")
    return min(times)


def window(traces: Iterable[Trace], start_s: float, end_s: float) -> list[Trace]:
    """What happened between two times; sessions that were open then begin with their route."""
    return [_window(trace, start_s, end_s) for trace in traces]


def _window(trace: Trace, start_s: float, end_s: float) -> Trace:
    routes: dict[str, Routed] = {}
    kept: list[Timed] = []
    for time_s, event in trace.events:
        if time_s > end_s:
            break
        if time_s >= start_s:
            kept.append((time_s, event))
        elif isinstance(event, Routed):
            routes[event.s] = event
        elif isinstance(event, Closed):
            routes.pop(event.s, None)
    is_over = trace.end_s < start_s  # dead before, or idle: nothing of it is of interest
    opened: list[Timed] = [] if is_over else [(start_s, route) for route in routes.values()]
    return Trace(began=trace.began, events=(*opened, *kept))
