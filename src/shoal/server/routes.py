"""Reading a Route: is it signed by the session's owner, and what does it ask of us?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from shoal.base.backend import BackendFacts
from shoal.base.errors import BadInput, ModelUnknown, PeerRefused, ProtocolError
from shoal.base.ids import PeerId, SessionId, session_id
from shoal.base.spans import Span
from shoal.net.identity import ROUTE, verify
from shoal.server.session import HopPlan
from shoal.wire.messages import Fork, Hop, Route, RouteBody, decode_route_body

MODEL_NAME_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """What a valid route asks of this server."""

    session: SessionId
    epoch: int
    parent: Fork | None
    hops: tuple[HopPlan, ...]


RunsHere = Callable[[SessionId, Span], bool]
"""Whether a hop of the session runs just these blocks here."""


def read_route(
    route: Route,
    sender: PeerId,
    me: PeerId,
    facts: BackendFacts,
    runs: RunsHere = lambda session, span: False,
) -> RoutePlan:
    """The hops that `route` gives to `me`; `sender` is the control stream's peer.

    `facts` judge it, but sessions that run here on blocks that we leave may go on, and so
    may their forks.

    Raises:
        ProtocolError: malformed, or hops that are no chain.
        PeerRefused: not signed by its owner, or sent by somebody else.
        ModelUnknown: for another model than ours.
        BadInput: blocks or an encoding that we don't serve, or no hop for us at all.
    """
    body = decode_route_body(route.body)
    owner = PeerId(body.owner)
    if owner != sender or not verify(owner, ROUTE, route.body, route.signature):
        raise PeerRefused("a route must be signed and sent by the session's owner")
    if body.model != facts.model:
        raise ModelUnknown(
            f"model {body.model[:MODEL_NAME_SHOWN]} is not served here "
            f"(this is {facts.model[:MODEL_NAME_SHOWN]})"
        )
    _check_chain(body.hops, owner)
    session = session_id(owner, body.nonce)
    mine = [index for index, hop in enumerate(body.hops) if hop.peer == me]
    known = [session] if body.parent is None else [session, SessionId(body.parent.session)]
    for index in mine:
        span = Span(body.hops[index].start, body.hops[index].end)
        if not facts.span.covers(span) and not any(runs(one, span) for one in known):
            raise BadInput(f"blocks {span} are not served here (we have {facts.span})")
    hops = tuple(_hop_plan(body, index, session, facts) for index in mine)
    if not hops:
        raise BadInput("this route has no hop for us")
    return RoutePlan(session=session, epoch=body.epoch, parent=body.parent, hops=hops)


def _check_chain(hops: list[Hop], owner: PeerId) -> None:
    for hop in hops:
        if hop.end < hop.start or (hop.start == hop.end and hop.peer != owner):
            raise ProtocolError(f"a hop over blocks [{hop.start},{hop.end})")
    for before, after in pairwise(hops):
        if before.end != after.start:
            raise ProtocolError(
                f"a hop ends at block {before.end}, the next begins at {after.start}"
            )
        if before.peer == after.peer:
            raise ProtocolError("two adjacent hops of one peer; merge them")


def _hop_plan(body: RouteBody, index: int, session: SessionId, facts: BackendFacts) -> HopPlan:
    hop, owner = body.hops[index], PeerId(body.owner)
    span = Span(hop.start, hop.end)
    if hop.encoding not in facts.encodings:
        raise BadInput(
            f"encoding {hop.encoding!r} is not served here (we have {', '.join(facts.encodings)})"
        )
    before = PeerId(body.hops[index - 1].peer) if index else owner
    after = PeerId(body.hops[index + 1].peer) if index + 1 < len(body.hops) else owner
    return HopPlan(
        session=session,
        owner=owner,
        opened_ms=body.opened_ms,
        epoch=body.epoch,
        span=span,
        predecessor=before,
        successor=after,
        is_last=index + 1 == len(body.hops),
        encoding=hop.encoding,
        num_hops=sum(1 for other in body.hops if other.end > other.start),
        is_fresh=hop.is_fresh,
    )
