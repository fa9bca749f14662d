"""What happened between two looks at a swarm. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Model = Mapping[str, Any]
"""A model with its servers, as `shoal status --json` prints it."""

Server = Mapping[str, Any]

EventKind = Literal[
    "joined", "left", "moved", "state", "lost", "back", "missing", "covered", "repaired"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    kind: EventKind
    text: str
    model: str = ""
    peer: str = ""


def compare(before: Sequence[Model], after: Sequence[Model]) -> list[Event]:
    """Events that explain the difference, in the order of models and servers."""
    old = {str(model["model"]): model for model in before}
    new = {str(model["model"]): model for model in after}
    events: list[Event] = []
    for name in [*new, *(name for name in old if name not in new)]:
        events += _of_model(name, old.get(name), new.get(name))
    return events


def _of_model(name: str, before: Model | None, after: Model | None) -> Iterator[Event]:
    old, new = _servers(before), _servers(after)
    for peer, server in new.items():
        if peer not in old:
            text = f"joined with blocks {_blocks(server)}, {server['state']}"
            yield Event(kind="joined", text=text, model=name, peer=peer)
        else:
            yield from _of_server(name, old[peer], server)
    for peer, server in old.items():
        if peer not in new:
            text = f"left; it had blocks {_blocks(server)}"
            yield Event(kind="left", text=text, model=name, peer=peer)
    yield from _of_coverage(name, before, after)


def _of_server(name: str, old: Server, new: Server) -> Iterator[Event]:
    peer = str(new["peer"])
    if old["blocks"] != new["blocks"]:
        text = f"moved from blocks {_blocks(old)} to {_blocks(new)}"
        yield Event(kind="moved", text=text, model=name, peer=peer)
    if old["state"] != new["state"]:
        text = f"{old['state']} until now, {new['state']} from now on"
        yield Event(kind="state", text=text, model=name, peer=peer)
    if bool(old["error"]) != bool(new["error"]):
        if new["error"]:
            text = f"does not answer: {new['error']}"
            yield Event(kind="lost", text=text, model=name, peer=peer)
        else:
            yield Event(kind="back", text="answers again", model=name, peer=peer)


def _of_coverage(name: str, before: Model | None, after: Model | None) -> Iterator[Event]:
    old = [list(span) for span in before["missing"]] if before else []
    new = [list(span) for span in after["missing"]] if after else []
    if old == new or (before is None and not new) or after is None:
        return
    if new:
        spans = ", ".join(f"[{start},{end})" for start, end in new)
        yield Event(kind="missing", text=f"nobody serves blocks {spans}", model=name)
    else:
        yield Event(kind="covered", text="all blocks are served", model=name)


def _servers(model: Model | None) -> dict[str, Server]:
    return {} if model is None else {str(server["peer"]): server for server in model["servers"]}


def _blocks(server: Server) -> str:
    start, end = server["blocks"]
    return f"[{start},{end})"
