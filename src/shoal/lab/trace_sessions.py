"""What the sessions of an incident did: chains, rows, cuts, forks, their ends. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from shoal.lab.trace_fates import Life
from shoal.lab.trace_past import Act, Link, SessionPast
from shoal.lab.trace_reading import Trace
from shoal.server.events import Arrived, Closed, Failed, Holds, Ran, Routed

JUST_S: Final = 1e-3
"""Just before."""


@dataclass(slots=True)
class Found:
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


def collect(traces: Iterable[Trace]) -> dict[str, Found]:
    """The events of each session that was routed, by its name."""
    found: dict[str, Found] = defaultdict(Found)
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


def find_sessions(
    found: dict[str, Found],
    fates: dict[str, tuple[Life, ...]],
    labels: dict[str, str],
    names: dict[str, str] | None,
) -> tuple[SessionPast, ...]:
    """The sessions in the order in which they were opened; r0, r1, ... unless `names` says else."""

    def opened(name: str) -> tuple[int, float]:
        time_s, route = found[name].routes[min(found[name].routes)]
        return route.opened_ms, time_s

    ordered = sorted(found, key=opened)
    if names is None:
        names = {name: f"r{index}" for index, name in enumerate(ordered)}
    pasts = (_session(found[name], name, names, labels) for name in ordered)
    return tuple(_with_end(past, found[past.name], fates, labels) for past in pasts)


def _session(one: Found, name: str, names: dict[str, str], labels: dict[str, str]) -> SessionPast:
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
        standbys=max(_standbys(route) for _, route in one.routes.values()),
    )


def _standbys(route: Routed) -> int:
    """How many stand by for one block."""
    blocks = Counter(block for _, start, end in route.standbys for block in range(start, end))
    return max(blocks.values(), default=0)


def _with_end(
    past: SessionPast, one: Found, fates: dict[str, tuple[Life, ...]], labels: dict[str, str]
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


def _acts(one: Found, length: int) -> Iterator[Act]:
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
