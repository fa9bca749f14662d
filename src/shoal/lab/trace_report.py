"""An incident and its replay side by side, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest

from shoal.lab.trace_past import Hop, Incident, ServerPast, SessionPast
from shoal.lab.trace_replay import Replay

GAP = "   "
"""Between the columns."""


def describe(incident: Incident) -> Iterator[str]:
    """Servers, and what went wrong with them."""
    yield (
        f"{len(incident.servers)} servers, {len(incident.sessions)} sessions, "
        f"{incident.num_blocks} blocks, {incident.end_s:.1f} s"
    )
    for server in incident.servers:
        traced = "" if server.began is not None else ", no trace"
        yield (
            f"  {server.label} {server.peer} blocks [{server.start},{server.end}){traced}"
            f"{_lives(server)}"
        )
    for one in incident.disturbances:
        yield f"  {one}"
    for note in incident.notes:
        yield f"  {note}"


def compare(incident: Incident, replay: Replay) -> Iterator[str]:
    """Each session: in the trace, in the lab."""
    here = {session.label: session for session in replay.incident.sessions}
    width = max(len(line) for past in incident.sessions for line in _story(past))
    yield f"  {'trace':{width}}{GAP}lab (seed {replay.seed})"
    for past in incident.sessions:
        mine = here.get(past.label)
        is_same = mine is not None and is_same_story(past, mine)
        yield f"{past.label} {past.name}{'' if is_same else '  DIFFERS'}"
        left = list(_story(past))
        right = [] if mine is None else list(_story(mine))
        if past.label in replay.ended:
            right.append(f"ended: {replay.ended[past.label]}")
        for one, other in zip_longest(left, right, fillvalue=""):
            yield f"  {one:{width}}{GAP}{other}".rstrip()


def same_stories(incident: Incident, replay: Replay) -> int:
    """Sessions that had the same chains and lengths in the lab."""
    here = {session.label: session for session in replay.incident.sessions}
    return sum(
        past.label in here and is_same_story(past, here[past.label]) for past in incident.sessions
    )


def is_same_story(one: SessionPast, other: SessionPast) -> bool:
    """Whether the chains followed each other in the same order, up to the same length."""
    return (one.chains, one.length) == (other.chains, other.length)


def _lives(server: ServerPast) -> str:
    words = []
    for life in server.lives:
        if life.born_s > 0:
            words.append(f"started at {life.born_s:.2f} s")
        if life.died_s is not None:
            words.append(f"{life.how or 'ended'} at {life.died_s:.2f} s")
    return "".join(f", {word}" for word in words)


def _story(session: SessionPast) -> Iterator[str]:
    chain: tuple[Hop, ...] = ()
    again = 0
    for link in session.epochs:
        if link.hops == chain:
            again += 1
            continue
        if again:
            yield f"epoch +{again} over the same chain"
        chain, again = link.hops, 0
        hops = " > ".join(f"{label}[{start},{end})" for label, start, end in link.hops)
        yield f"epoch {link.epoch} at {link.at_s:.2f} s: {hops}"
    if again:
        yield f"epoch +{again} over the same chain"
    for label, count in Counter(session.evictions).items():
        yield f"evicted at {label}: {count}"
    for failure in session.failures:
        yield f"failed at {failure}"
    if session.gaps or session.stale:
        yield f"gaps {session.gaps}, stale {session.stale}"
    closed = "open" if session.closed_s is None else f"closed at {session.closed_s:.2f} s"
    yield f"{session.length} positions, {closed}"
