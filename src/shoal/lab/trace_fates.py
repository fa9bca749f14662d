"""When servers were there, when they died, stood still or could not reach each other. Pure.

A process that is killed says nothing; its successors' and clients' doings do. The rules are
written beside each case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shoal.lab.trace_reading import Trace
from shoal.server.events import Ended, Linked, Routed

NOTICED_S: Final = 1.0
"""Streams of a process that ended break within this; silence is noticed later."""

RECENT_S: Final = 3.0
"""Whoever is missed within this of its last word died then; else it was idle and died later."""

BEFORE_S: Final = 0.05
"""A death that was noticed at once happened this long before."""

FROZEN_MIN_S: Final = 1.0
"""Silence that makes others leave a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """From start to end of one process; `died_s` None: beyond the incident's end."""

    born_s: float
    died_s: float | None = None
    how: Literal["", "killed", "silent", "stopped"] = ""
    """silent: streams to it did not break."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What was wrong with a server that lived: it stood still, or `other` did not reach it."""

    kind: Literal["freeze", "cut"]
    label: str
    other: str
    at_s: float
    lasts_s: float

    def __str__(self) -> str:
        if self.kind == "freeze":
            return f"{self.label} stood still at {self.at_s:.2f} s for {self.lasts_s:.2f} s"
        return f"{self.other} could not reach {self.label} from {self.at_s:.2f} s on"


Fates = tuple[dict[str, tuple[Life, ...]], tuple[Disturbance, ...], tuple[str, ...]]
Route = tuple[float, Routed]


@dataclass(slots=True)
class _Missed:
    """When and why others missed a server."""

    broken: list[tuple[float, str]]
    """(time, who could not reach it)."""
    left_out: list[float]
    """Routes that replaced it."""

    @property
    def times(self) -> list[float]:
        return sorted([time_s for time_s, _ in self.broken] + self.left_out)


def find_fates(traces: Sequence[Trace], routes: Sequence[Route], labels: dict[str, str]) -> Fates:
    """The lives of all servers, by peer, the disturbances, and what stays unexplained.

    `routes` are in order of time.
    """
    missed = _missed(traces, routes, labels)
    seen = _seen(routes, labels)
    processes: dict[str, list[Trace]] = defaultdict(list)
    for trace in traces:
        processes[trace.peer].append(trace)
    end_s = max(trace.end_s for trace in traces)
    lives: dict[str, tuple[Life, ...]] = {}
    disturbances: list[Disturbance] = []
    notes: list[str] = []
    for peer, label in labels.items():
        mine = missed[peer]
        if peer not in processes:
            lives[peer] = _untraced(mine, seen[peer])
            continue
        lives[peer] = tuple(
            _traced(trace, following, mine, routes[0][0])
            for trace, following in zip(processes[peer], [*processes[peer][1:], None], strict=True)
        )
        for at_s in mine.left_out:
            alive = [
                trace
                for trace, life in zip(processes[peer], lives[peer], strict=True)
                if _covers(life, at_s)
            ]
            if not alive:
                continue
            known = _disturbance(label, labels, alive[0], mine, at_s, end_s)
            if known is None:
                notes.append(f"{label} was left at {at_s:.2f} s; the traces don't say why")
            elif known not in disturbances:
                disturbances.append(known)
    return lives, tuple(disturbances), tuple(notes)


def _missed(
    traces: Sequence[Trace], routes: Sequence[Route], labels: dict[str, str]
) -> dict[str, _Missed]:
    missed = {peer: _Missed([], []) for peer in labels}
    for trace in traces:
        for time_s, event in trace.events:
            if isinstance(event, Linked) and event.what == "broken" and event.peer in missed:
                missed[event.peer].broken.append((time_s, trace.peer))
    chains: dict[str, set[str]] = {}
    for time_s, route in routes:
        peers = {peer for peer, start, end in route.hops if start < end}
        for peer in chains.get(route.s, set()) - peers:
            if peer in missed:
                missed[peer].left_out.append(time_s)
        chains[route.s] = peers
    return missed


def _seen(routes: Iterable[Route], labels: dict[str, str]) -> dict[str, list[float]]:
    """When sessions were routed over each server."""
    seen: dict[str, list[float]] = {peer: [] for peer in labels}
    for time_s, route in routes:
        for peer, start, end in route.hops:
            if start < end and peer in seen:
                seen[peer].append(time_s)
    return seen


def _traced(trace: Trace, following: Trace | None, missed: _Missed, first_s: float) -> Life:
    """Whoever was there at the first route (`first_s`) is there from the beginning."""
    born_s = trace.began.boot_s if trace.began.boot_s > first_s else 0.0
    last_s = trace.end_s
    ended = [(time_s, event) for time_s, event in trace.events if isinstance(event, Ended)]
    if ended:
        return Life(
            born_s=born_s, died_s=ended[-1][0], how="killed" if ended[-1][1].code else "stopped"
        )
    limit_s = following.began.boot_s if following is not None else float("inf")
    times = [time_s for time_s in missed.times if last_s - BEFORE_S <= time_s <= limit_s]
    if not times:
        if following is None:
            return Life(born_s=born_s)
        # nobody missed it, so it was idle: somewhen between its last word and its next
        return Life(born_s=born_s, died_s=(last_s + limit_s) / 2, how="killed")
    died_s, how = _death(last_s, times[0], missed)
    return Life(born_s=born_s, died_s=died_s, how=how)


def _death(
    last_s: float, missed_s: float, missed: _Missed
) -> tuple[float, Literal["killed", "silent"]]:
    is_broken = any(abs(time_s - missed_s) < NOTICED_S for time_s, _ in missed.broken)
    if missed_s - last_s < RECENT_S:
        return last_s, "killed" if is_broken or missed_s - last_s < NOTICED_S else "silent"
    return max(last_s, missed_s - BEFORE_S), "killed"


def _untraced(missed: _Missed, seen: Sequence[float]) -> tuple[Life, ...]:
    """It lives until it is missed, and again when a session is routed over it."""
    lives: list[Life] = []
    born_s = 0.0
    for missed_s in missed.times:
        if lives and missed_s <= born_s:
            continue
        died_s = max(born_s, missed_s - BEFORE_S)
        lives.append(Life(born_s=born_s, died_s=died_s, how="killed"))
        back = [time_s for time_s in seen if time_s > missed_s + BEFORE_S]
        if not back:
            return tuple(lives)
        born_s = max(died_s, back[0] - BEFORE_S)
    return (*lives, Life(born_s=born_s))


def _covers(life: Life, at_s: float) -> bool:
    return life.born_s <= at_s and (life.died_s is None or life.died_s > at_s)


def _disturbance(
    label: str,
    labels: dict[str, str],
    trace: Trace,
    missed: _Missed,
    at_s: float,
    end_s: float,
) -> Disturbance | None:
    """Why a living server was left: it said nothing for long, or somebody did not reach it."""
    times = [time_s for time_s, _ in trace.events]
    before = max((time_s for time_s in times if time_s <= at_s), default=trace.began.boot_s)
    after = min((time_s for time_s in times if time_s > at_s), default=end_s)
    if after - before > FROZEN_MIN_S:
        return Disturbance(
            kind="freeze", label=label, other=label, at_s=before, lasts_s=after - before
        )
    for time_s, peer in missed.broken:
        if peer in labels and 0 <= at_s - time_s < RECENT_S:
            return Disturbance(
                kind="cut",
                label=label,
                other=labels[peer],
                at_s=max(0.0, time_s - BEFORE_S),
                lasts_s=end_s - time_s,
            )
    return None
