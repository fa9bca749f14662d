"""Reading a Route: is it signed by the session's owner, and what does it ask of us?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from shoal.base.backend import BackendFacts
from shoal.base.errors import (
    BadInput,
    ModelUnknown,
    PeerRefused,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, SessionId, session_id
from shoal.base.limits import STANDBYS_PER_BORDER_MAX
from shoal.base.spans import Span
from shoal.net.identity import ROUTE, verify
from shoal.server.session import Feed, HopPlan
from shoal.wire.messages import Fork, Hop, Route, RouteBody, Standby, decode_route_body

MODEL_NAME_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """What a valid route asks of this server."""

    session: SessionId
    epoch: int
    parent: Fork | None
    hops: tuple[HopPlan, ...]
    refused: tuple[tuple[int, ShoalError], ...] = ()
    """Standbys that we can't be, by start block, and why; the hops are followed all the same."""


RunsHere = Callable[[SessionId, Span], bool]
"""Whether a hop of the session runs just these blocks here."""


def read_route(
    route: Route,
    sender: PeerId,
    me: PeerId,
    facts: BackendFacts,
    runs: RunsHere = lambda session, span: False,
) -> RoutePlan:
    """The hops and standbys that `route` gives to `me`; `sender` is the control stream's peer.

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
    _check_standbys(body)
    session = session_id(owner, body.nonce)
    served = _Served(facts, session, body.parent, runs)
    hops = tuple(
        _hop_plan(body, index, session, served)
        for index, hop in enumerate(body.hops)
        if hop.peer == me
    )
    standbys, refused = _standby_plans(body, me, session, served)
    if refused and not hops + standbys:
        raise refused[0][1]
    if not hops + standbys:
        raise BadInput("this route has no hop for us")
    return RoutePlan(
        session=session,
        epoch=body.epoch,
        parent=body.parent,
        hops=hops + standbys,
        refused=refused,
    )


def _standby_plans(
    body: RouteBody, me: PeerId, session: SessionId, served: _Served
) -> tuple[tuple[HopPlan, ...], tuple[tuple[int, ShoalError], ...]]:
    """What we are to be beside the chain, and what of it we can't."""
    plans: list[HopPlan] = []
    refused: list[tuple[int, ShoalError]] = []
    for standby in body.standbys:
        if standby.peer != me:
            continue
        try:
            plans.append(_standby_plan(body, standby, session, served))
        except BadInput as error:
            refused.append((standby.start, error))
    return tuple(plans), tuple(refused)


def _check_chain(hops: list[Hop], owner: PeerId) -> None:
    for hop in hops:
        if hop.end < hop.start or (hop.start == hop.end and hop.peer != owner):
            raise ProtocolError(f"a hop over blocks [{hop.start},{hop.end})")
    for before, after in pairwise(hops):
        if before.end != after.start:
            raise ProtocolError(
                f"a hop ends at block {before.end}, the next begins at {after.start}"
            )


def _check_standbys(body: RouteBody) -> None:
    """Each is fed by somebody, and no state of a peer could be taken for another."""
    for standby in body.standbys:
        if standby.end <= standby.start or standby.peer == body.owner:
            raise ProtocolError(f"a standby over blocks [{standby.start},{standby.end})")
        if feeder_of(body, standby) is None:
            raise ProtocolError(f"nobody feeds the standby over [{standby.start},{standby.end})")
    if not body.standbys:
        return
    everybody: list[Hop | Standby] = [*(h for h in body.hops if h.end > h.start), *body.standbys]
    begin = Counter(standby.start for standby in body.standbys)
    if max(begin.values()) > STANDBYS_PER_BORDER_MAX:
        raise ProtocolError(f"more than {STANDBYS_PER_BORDER_MAX} standbys begin at one block")
    starts = Counter((one.peer, one.start) for one in everybody)
    ends = Counter((one.peer, one.end) for one in everybody)
    if max((starts | ends).values()) > 1:
        raise ProtocolError("two hops of one peer begin or end at the same block")


def feeder_of(body: RouteBody, standby: Standby) -> PeerId | None:
    """Who sends rows to this standby; None: nobody does."""
    if standby.start == body.hops[0].start:
        return PeerId(body.owner)
    everybody: list[Hop | Standby] = [*body.hops, *body.standbys]
    for one in everybody:
        if one.end == standby.start and one.end > one.start:
            return PeerId(one.peer)
    return None


def _feeds(body: RouteBody, peer: PeerId, end: int) -> tuple[Feed, ...]:
    """The standbys that the hop or standby of `peer` over [..., end) feeds."""
    return tuple(
        Feed(peer=PeerId(standby.peer), lag_rows=standby.lag_rows)
        for standby in body.standbys
        if standby.start == end and feeder_of(body, standby) == peer
    )


@dataclass(frozen=True, slots=True)
class _Served:
    """What may be asked of us for one session."""

    facts: BackendFacts
    session: SessionId
    parent: Fork | None
    runs: RunsHere

    def check(self, span: Span, encoding: str) -> None:
        """Raise BadInput unless we run these blocks and speak this encoding."""
        facts = self.facts
        if not facts.span.covers(span) and not self._runs_already(span):
            raise BadInput(f"blocks {span} are not served here (we have {facts.span})")
        if encoding not in facts.encodings:
            raise BadInput(
                f"encoding {encoding!r} is not served here (we have {', '.join(facts.encodings)})"
            )

    def _runs_already(self, span: Span) -> bool:
        known = [self.session]
        if self.parent is not None:
            known.append(SessionId(self.parent.session))
        return any(self.runs(session, span) for session in known)


def _standby_plan(
    body: RouteBody, standby: Standby, session: SessionId, served: _Served
) -> HopPlan:
    span = Span(standby.start, standby.end)
    served.check(span, standby.encoding)
    feeder = feeder_of(body, standby)
    if feeder is None:
        raise ProtocolError(f"nobody feeds the standby over {span}")
    return HopPlan(
        session=session,
        owner=PeerId(body.owner),
        opened_ms=body.opened_ms,
        epoch=body.epoch,
        span=span,
        predecessor=feeder,
        successor=None,
        is_last=span.end == body.hops[-1].end,
        encoding=standby.encoding,
        adapter=body.adapter,
        num_hops=_num_hops(body),
        feeds=_feeds(body, PeerId(standby.peer), span.end),
    )


def _num_hops(body: RouteBody) -> int:
    return sum(1 for hop in body.hops if hop.end > hop.start)


def _hop_plan(body: RouteBody, index: int, session: SessionId, served: _Served) -> HopPlan:
    hop, owner = body.hops[index], PeerId(body.owner)
    span = Span(hop.start, hop.end)
    served.check(span, hop.encoding)
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
        adapter=body.adapter,
        num_hops=_num_hops(body),
        is_fresh=hop.is_fresh,
        feeds=_feeds(body, PeerId(hop.peer), hop.end),
    )
