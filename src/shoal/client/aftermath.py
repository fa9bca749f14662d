"""What follows from a change of a session's chain, whether it was forced or planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.base.ids import PeerId
from shoal.client.session import SessionState
from shoal.plan.view import Stage, SwarmView


def gone(before: Iterable[PeerId], state: SessionState) -> list[PeerId]:
    """Peers of `before` that the session no longer uses: to be told to forget it."""
    return sorted(set(before) - state.peers)


def judge_numerics(
    state: SessionState, view: SwarmView, before: Sequence[Stage], after: Sequence[Stage]
) -> None:
    """Say what the text's numbers are worth after this change (design, the promise)."""
    servers = {server.peer: server for server in view.servers}
    old = dict(state.classes)
    for stage in after:
        server = servers.get(stage.peer)
        numerics = old.get(stage.peer) if server is None else server.numerics
        if numerics is None:
            continue
        state.classes[stage.peer] = numerics
        is_exact = server is not None and server.is_exact
        if not is_exact and state.numerics == "exact":
            state.numerics = "same-class"
        lost_classes = {
            old.get(stage_before.peer, "")
            for stage_before in before
            if stage_before.span.overlap(stage.span) and stage_before.peer != stage.peer
        }
        if lost_classes - {numerics}:
            state.numerics = "crossed"
