"""What happened: the sessions and servers of one incident, as the traces of some servers tell.

Pure. Times are seconds from the incident's first event. Servers are called s0, s1, ... and
sessions r0, r1, ..., in the order of their blocks and of their opening, so that an incident
and its replay can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Final, Literal

from shoal.base.errors import ConfigError
from shoal.lab.trace_fates import Disturbance, Life, find_fates
from shoal.lab.trace_reading import Trace
from shoal.server.events import Arrived, Began, Closed, Failed, Holds, Ran, Routed

SESSIONS_MAX: Final = 256
SERVERS_MAX: Final = 128
ROW_BLOCKS_MAX: Final = 5_000_000
"""Rows times blocks of one replay: about a minute."""

JUST_S: Final = 1e-3
"""Just before."""

DELAY_S: Final = 1e-3
"""One way between servers, where the traces don't show it."""

LEAD_S: Final = 2.0
"""The incident begins this long before the first route."""

DELAYS_MIN: Final = 5

DELAY_S_MAX: Final = 0.5
"""Beyond it something else was waited for."""

SKEW_S: Final = 0.05
"""Clocks of machines that differ by more are set by the routes that both followed."""

Hop = tuple[str, int, int]
"""(server's label, first block, block behind the last)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPast:
    """One server: its blocks, and when it was there."""

    label: str
    peer: str
    start: int
    end: int
    began: Began | None
    """How it was set up; None: it recorded nothing, others speak of it."""
    lives: tuple[Life, ...]
    iteration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A chain that a session had."""

    epoch: int
    at_s: float
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What the client did: `count` rows in one entry, or a cut to position `count`."""

    kind: Literal["rows", "cut"]
    at_s: float
    count: int
    want: Literal[0, 1, 2] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPast:
    """One session: its chains, its rows, its end."""

    label: str
    name: str
    owner: str
    opened_ms: int
    parent: str
    """Label of the session that it was forked from, or ""."""
    parent_length: int
    epochs: tuple[Link, ...]
    acts: tuple[Act, ...]
    closed_s: float | None
    evictions: tuple[str, ...]
    """Labels of the servers that took its cache away, in order."""
    failures: tuple[str, ...]
    """"label: code" of each server that could not go on."""
    gaps: int
    stale: int

    @property
    def chains(self) -> list[tuple[Hop, ...]]:
        """The chains in order, without repetitions."""
        chains: list[tuple[Hop, ...]] = []
        for link in self.epochs:
            if not chains or chains[-1] != link.hops:
                chains.append(link.hops)
        return chains

    @property
    def length(self) -> int:
        """Positions at the end."""
        length = self.parent_length if self.parent else 0
        for act in self.acts:
            length = length + act.count if act.kind == "rows" else act.count
        return length


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Everything that is known."""

    num_blocks: int
    began: Began
    """The bounds of one server, which are taken for all."""
    servers: tuple[ServerPast, ...]
    sessions: tuple[SessionPast, ...]
    disturbances: tuple[Disturbance, ...]
    delay_s: float
    """One way between two servers."""
    end_s: float
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Found:
    """A session's events while they are collected."""

    routes: dict[int, tuple[float, Routed]] = field(default_factory=dict)
    arrivals: list[tuple[float, Arrived]] = field(default_factory=list)
    closings: list[tuple[float, str]] = field(default_factory=list)
    evictions: list[tuple[float, str]] = field(default_factory=list)
    failures: list[tuple[float, str, str]] = field(default_factory=list)
    outputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By peer, the last one: (time, length of its log)."""
    gaps: int = 0
    stale: int = 0


def find_incident(
    traces: Sequence[Trace],
    *,
    labels: dict[str, str] | None = None,
    names: dict[str, str] | None = None,
) -> Incident:
    """The incident that these traces tell of.

    `labels` and `names` are what peers and sessions are called, instead of s0 and r0 and so on.

    Raises:
        ConfigError: they tell of no session, of different models, or of more than a replay holds.
    """
    traces = _aligned(traces)
    num_blocks = _num_blocks(traces)
    zero_s = min(_first_route_s(traces), *(trace.end_s for trace in traces)) - LEAD_S
    traces = [trace.shifted(-zero_s) for trace in traces]
    found = _collect(traces)
    if not any(one.routes for one in found.values()):
        raise ConfigError("the traces tell of no session: give those of the servers that had one")
    spans = _spans(traces, found)
    labels = labels or _label(spans)
    if len(spans) > SERVERS_MAX or len(found) > SESSIONS_MAX:
        raise ConfigError(
            f"{len(spans)} servers and {len(found)} sessions are too many for one replay "
            f"(at most {SERVERS_MAX} and {SESSIONS_MAX}): cut the incident out of the traces"
        )
    routes = sorted(
        (item for one in found.values() for item in one.routes.values()), key=lambda item: item[0]
    )
    fates, disturbances, notes = find_fates(traces, routes, labels)
    sessions = tuple(
        _with_end(one, found[one.name], fates, labels) for one in _sessions(found, labels, names)
    )
    rows = sum(act.count for one in sessions for act in one.acts if act.kind == "rows")
    if rows * num_blocks > ROW_BLOCKS_MAX:
        raise ConfigError(
            f"{rows} rows through {num_blocks} blocks are too many for one replay: "
            "cut the incident out of the traces"
        )
    paces = _paces(traces)
    usual_s = median(paces.values()) if paces else 0.005
    by_peer = {trace.peer: trace.began for trace in traces}
    servers = tuple(
        ServerPast(
            label=labels[peer],
            peer=peer,
            start=span[0],
            end=span[1],
            began=by_peer.get(peer),
            lives=fates[peer],
            iteration_s=paces.get(peer, usual_s),
        )
        for peer, span in sorted(spans.items(), key=lambda item: labels[item[0]])
    )
    return Incident(
        num_blocks=num_blocks,
        began=traces[0].began,
        servers=servers,
        sessions=sessions,
        disturbances=disturbances,
        delay_s=_delay_s(traces),
        end_s=max(trace.end_s for trace in traces),
        notes=notes,
    )


# --- clocks --------------------------------------------------------------------------


def _aligned(traces: Sequence[Trace]) -> list[Trace]:
    """On one clock: what two servers followed, they followed at about the same time."""
    if not traces:
        raise ConfigError("no traces: name at least one file")
    by_routes = sorted(traces, key=lambda trace: -len(_route_times(trace)))
    known = dict(_route_times(by_routes[0]))
    done = [by_routes[0]]
    for trace in by_routes[1:]:
        mine = _route_times(trace)
        shifts = [known[key] - mine[key] for key in known.keys() & mine.keys()]
        by_s = median(shifts) if shifts else 0.0
        moved = trace.shifted(by_s) if abs(by_s) > SKEW_S else trace
        known = {**_route_times(moved), **known}
        done.append(moved)
    return sorted(done, key=lambda trace: (trace.peer, trace.began.boot_s))


def _route_times(trace: Trace) -> dict[tuple[str, int], float]:
    times: dict[tuple[str, int], float] = {}
    for time_s, event in trace.events:
        if isinstance(event, Routed):
            times.setdefault((event.s, event.epoch), time_s)
    return times


def _first_route_s(traces: Iterable[Trace]) -> float:
    times = (time_s for trace in traces for time_s in _route_times(trace).values())
    return min(times, default=float("inf"))


# --- servers -------------------------------------------------------------------------


def _num_blocks(traces: Iterable[Trace]) -> int:
    numbers = {trace.began.num_blocks for trace in traces}
    if len(numbers) > 1:
        raise ConfigError(f"the traces are of models with {sorted(numbers)} blocks: replay one")
    return numbers.pop()


def _spans(traces: Iterable[Trace], found: dict[str, _Found]) -> dict[str, tuple[int, int]]:
    """Blocks of each server, by what it and the routes say; without clients that relay.

    A server that went to other blocks has both.
    """
    spans = {trace.peer: (trace.began.start, trace.began.end) for trace in traces}
    for one in found.values():
        for _, route in one.routes.values():
            for peer, start, end in route.hops:
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


# --- sessions ------------------------------------------------------------------------


def _collect(traces: Iterable[Trace]) -> dict[str, _Found]:
    found: dict[str, _Found] = defaultdict(_Found)
    for trace in traces:
        for time_s, event in trace.events:
            match event:
                case Routed():
                    known = found[event.s].routes.get(event.epoch)
                    if not event.in_force and (known is None or time_s < known[0]):
                        found[event.s].routes[event.epoch] = (time_s, event)
                case Arrived(answer="stale"):
                    found[event.s].stale += 1
                case Arrived():
                    found[event.s].gaps += event.answer == "gap"
                    found[event.s].arrivals.append((time_s, event))
                case Ran():
                    found[event.s].outputs[trace.peer] = (time_s, event.end)
                case Closed():
                    found[event.s].closings.append((time_s, trace.peer))
                case Holds(is_evicted=True):
                    found[event.s].evictions.append((time_s, trace.peer))
                case Failed():
                    found[event.s].failures.append((time_s, trace.peer, event.code))
    return {name: one for name, one in found.items() if one.routes}


def _sessions(
    found: dict[str, _Found], labels: dict[str, str], names: dict[str, str] | None
) -> tuple[SessionPast, ...]:
    def opened(name: str) -> tuple[int, float]:
        time_s, route = found[name].routes[min(found[name].routes)]
        return route.opened_ms, time_s

    ordered = sorted(found, key=opened)
    if names is None:
        names = {name: f"r{index}" for index, name in enumerate(ordered)}
    return tuple(_session(found[name], name, names, labels) for name in ordered)


def _session(one: _Found, name: str, names: dict[str, str], labels: dict[str, str]) -> SessionPast:
    epochs = tuple(
        Link(
            epoch=epoch,
            at_s=time_s,
            hops=tuple(
                (labels[peer], start, end) for peer, start, end in route.hops if start < end
            ),
        )
        for epoch, (time_s, route) in sorted(one.routes.items())
    )
    first = one.routes[min(one.routes)][1]
    parent = names.get(first.parent, "")
    length = first.parent_length if parent else 0
    acts = tuple(_acts(one, length))
    last = one.routes[max(one.routes)][1]
    last_act_s = acts[-1].at_s if acts else epochs[0].at_s
    ends = [
        time_s
        for time_s, peer in one.closings
        if any(hop[0] == peer for hop in last.hops) and time_s >= last_act_s
    ]
    return SessionPast(
        label=names.get(name, name),
        name=name,
        owner=first.owner,
        opened_ms=first.opened_ms,
        parent=parent,
        parent_length=length,
        epochs=epochs,
        acts=acts,
        closed_s=min(ends, default=None),
        evictions=tuple(labels[peer] for _, peer in sorted(one.evictions)),
        failures=tuple(f"{labels[peer]}: {code}" for _, peer, code in sorted(one.failures)),
        gaps=one.gaps,
        stale=one.stale,
    )


def _with_end(
    past: SessionPast, one: _Found, fates: dict[str, tuple[Life, ...]], labels: dict[str, str]
) -> SessionPast:
    """With its end, where the server that heard of it died: nobody missed that server.

    A session whose last row was answered, and which was not routed anew when a server of its
    chain died, had ended.
    """
    if past.closed_s is not None:
        return past
    since_s = past.epochs[-1].at_s
    peers = {hop[0] for hop in past.epochs[-1].hops}
    died = [
        life.died_s
        for peer, lives in fates.items()
        for life in lives
        if labels[peer] in peers and life.died_s is not None and life.died_s >= since_s
    ]
    last = past.epochs[-1].hops[-1][0]
    answered_s = [
        time_s
        for peer, (time_s, end) in one.outputs.items()
        if labels[peer] == last and end == past.length
    ]
    if not died or not answered_s:
        return past
    return replace(past, closed_s=max(answered_s[0], min(died) - JUST_S))


def _acts(one: _Found, length: int) -> Iterator[Act]:
    """What the client sent, from the first arrival of each row anywhere.

    Rows that no trace shows (it began later, or lost its first part) come as one prompt.
    """
    first_s = one.routes[min(one.routes)][0]
    rev = 0
    for time_s, event in sorted(one.arrivals, key=lambda item: item[0]):
        if event.rev < rev:
            continue
        if event.rev > rev:
            lowest = min([at for cut_rev, at in event.cuts if cut_rev > rev], default=length)
            rev = event.rev
            if lowest < length:
                yield Act(kind="cut", at_s=time_s, count=lowest)
                length = lowest
        if event.pos + event.n <= length:
            continue
        if event.pos > length:
            yield Act(kind="rows", at_s=first_s, count=event.pos - length)
            length = event.pos
        yield Act(kind="rows", at_s=time_s, count=event.pos + event.n - length, want=event.want)
        length = event.pos + event.n
