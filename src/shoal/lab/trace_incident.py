"""From the traces of some servers to the incident that they tell of. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab.trace_clocks import aligned, first_route_s, window
from shoal.lab.trace_fates import Life, find_fates
from shoal.lab.trace_past import Incident, ServerPast
from shoal.lab.trace_reading import Trace
from shoal.lab.trace_sessions import Found, collect, find_sessions
from shoal.server.events import Arrived, Ran

SESSIONS_MAX: Final = 256
SERVERS_MAX: Final = 128
ROW_BLOCKS_MAX: Final = 5_000_000
"""Rows times blocks of one replay: a minute or two."""

SECONDS_MAX: Final = 6 * 3600
"""Virtual time passes slowly where many servers idle: minutes for an evening."""

ITERATION_S: Final = 0.005
"""Of a server, where the traces don't show it."""

DELAY_S: Final = 1e-3
"""One way between servers, where the traces don't show it."""

LEAD_S: Final = 2.0
"""The incident begins this long before the first route."""

DELAYS_MIN: Final = 5

DELAY_S_MAX: Final = 0.5
"""Beyond it something else was waited for."""


def find_incident(
    traces: Sequence[Trace],
    *,
    labels: dict[str, str] | None = None,
    names: dict[str, str] | None = None,
    between_s: tuple[float, float] | None = None,
) -> Incident:
    """The incident that these traces tell of.

    `labels` and `names` are what peers and sessions are called, instead of s0 and r0 and so on.
    `between_s` takes a part, in seconds as an incident of the whole counts them.

    Raises:
        ConfigError: they tell of no session, of different models, or of more than a replay holds.
    """
    traces = aligned(traces)
    num_blocks = _num_blocks(traces)
    if between_s is not None:
        start_s, end_s = (first_route_s(traces) - LEAD_S + time_s for time_s in between_s)
        traces = window(traces, start_s, end_s)
    zero_s = first_route_s(traces) - LEAD_S
    traces = [trace.shifted(-zero_s) for trace in traces]
    found = collect(traces)
    spans = _spans(traces, found)
    labels = labels or _label(spans)
    routes = sorted(
        (item for one in found.values() for item in one.routes.values()), key=lambda item: item[0]
    )
    if not routes:
        raise ConfigError("the traces tell only of routes that did not count")
    fates, disturbances, notes = find_fates(traces, routes, labels)
    sessions = find_sessions(found, fates, labels, names)
    incident = Incident(
        num_blocks=num_blocks,
        began=traces[0].began,
        servers=_servers(traces, spans, labels, fates),
        sessions=sessions,
        disturbances=disturbances,
        delay_s=_delay_s(traces),
        end_s=max(trace.end_s for trace in traces),
        notes=notes,
    )
    _check_size(incident)
    return incident


def _check_size(incident: Incident) -> None:
    rows = sum(act.count for one in incident.sessions for act in one.acts if act.kind == "rows")
    for what, count, limit in (
        ("servers", len(incident.servers), SERVERS_MAX),
        ("sessions", len(incident.sessions), SESSIONS_MAX),
        ("seconds", int(incident.end_s), SECONDS_MAX),
        ("rows times blocks", rows * incident.num_blocks, ROW_BLOCKS_MAX),
    ):
        if count > limit:
            raise ConfigError(
                f"{count} {what} are too many for one replay (at most {limit}); the traces span "
                f"{incident.end_s:.0f} s: take a part of them with --from and --to"
            )


def _servers(
    traces: Sequence[Trace],
    spans: dict[str, tuple[int, int]],
    labels: dict[str, str],
    fates: dict[str, tuple[Life, ...]],
) -> tuple[ServerPast, ...]:
    paces = _paces(traces)
    usual_s = median(paces.values()) if paces else ITERATION_S
    by_peer = {trace.peer: trace.began for trace in traces}
    return tuple(
        ServerPast(
            label=labels[peer],
            peer=peer,
            start=start,
            end=end,
            began=by_peer.get(peer),
            lives=fates[peer],
            iteration_s=paces.get(peer, usual_s),
        )
        for peer, (start, end) in sorted(spans.items(), key=lambda item: labels[item[0]])
    )


# --- servers -------------------------------------------------------------------------


def _num_blocks(traces: Iterable[Trace]) -> int:
    numbers = {trace.began.num_blocks for trace in traces}
    if len(numbers) > 1:
        raise ConfigError(f"the traces are of models with {sorted(numbers)} blocks: replay one")
    return numbers.pop()


def _spans(traces: Iterable[Trace], found: dict[str, Found]) -> dict[str, tuple[int, int]]:
    """Blocks of each server, by what it and the routes say; without clients that relay.

    A server that went to other blocks has both.
    """
    spans = {trace.peer: (trace.began.start, trace.began.end) for trace in traces}
    for one in found.values():
        for _, route in one.routes.values():
            for peer, start, end in (*route.hops, *route.standbys):
                if start < end:
                    before = spans.get(peer, (start, end))
                    spans[peer] = (min(before[0], start), max(before[1], end))
    return spans


def _label(spans: dict[str, tuple[int, int]]) -> dict[str, str]:
    width = len(str(max(0, len(spans) - 1)))
    ordered = sorted(spans, key=lambda peer: (spans[peer], peer))
    return {peer: f"s{index:0{width}}" for index, peer in enumerate(ordered)}


def _paces(traces: Iterable[Trace]) -> dict[str, float]:
    """From a single row's arrival until its output, where that was seen often enough."""
    paces: dict[str, list[float]] = defaultdict(list)
    for trace in traces:
        waiting: dict[tuple[str, int], tuple[int, float]] = {}
        for time_s, event in trace.events:
            if isinstance(event, Arrived) and event.n == 1 and not event.answer:
                waiting[event.s, event.at] = (event.pos + 1, time_s)
            elif isinstance(event, Ran):
                end, since_s = waiting.get((event.s, event.at), (-1, 0.0))
                if end == event.end:
                    del waiting[event.s, event.at]
                    paces[trace.peer].append(time_s - since_s)
    return {peer: max(0.0, _quickest(times)) for peer, times in paces.items()}


def _quickest(times: Sequence[float]) -> float:
    """The lower tenth: what it took when nothing else was in the way."""
    return sorted(times)[len(times) // 10]


def _delay_s(traces: Iterable[Trace]) -> float:
    """From an output at one server until its arrival at the next, replays aside."""
    latest: dict[tuple[str, int], tuple[int, float]] = {}
    border = {trace.peer: trace.began.end for trace in traces}
    events = sorted(
        ((time_s, trace.peer, event) for trace in traces for time_s, event in trace.events),
        key=lambda item: item[0],
    )
    delays: list[float] = []
    for time_s, peer, event in events:
        if isinstance(event, Ran):
            latest[event.s, border[peer]] = (event.end, time_s)
        elif isinstance(event, Arrived) and not event.answer:
            end, sent_s = latest.get((event.s, event.at), (-1, 0.0))
            if end == event.pos + event.n:
                delays.append(time_s - sent_s)
    if len(delays) < DELAYS_MIN:
        return DELAY_S
    return min(DELAY_S_MAX, max(0.0, _quickest(delays)))
