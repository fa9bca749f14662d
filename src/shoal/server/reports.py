"""What a server says of itself when it is asked: pure functions over its engine and sessions."""

from __future__ import annotations

from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import DETAIL_CHARS_MAX, HOPS_MAX
from shoal.link.outbound import Outbound
from shoal.server.engine import Engine
from shoal.server.session import HopSession
from shoal.server.sessions import SessionTable
from shoal.wire.directory import Load
from shoal.wire.messages import (
    Alive,
    Broken,
    Failed,
    GetHeld,
    Have,
    Held,
    Routed,
)


def alive(engine: Engine, call: int, now_s: float) -> Alive:
    """How the engine is doing."""
    estimate_s = engine.pace.estimate_s(max(1, engine.running_tokens))
    running_s = now_s - engine.running_since_s if engine.running_tokens else 0.0
    eta_s = running_s + engine.pace.estimate_s(max(1, engine.queued_tokens))
    return Alive(
        call,
        engine.iteration,
        eta_s,
        running_s,
        estimate_s,
        engine.pace.decode_s_per_block(now_s),
    )


def load(engine: Engine, sessions: SessionTable, call: int, now_s: float) -> Load:
    """How full the server is."""
    ledger = sessions.ledger
    return Load(
        call=call,
        cache_tokens=ledger.total * ledger.page_tokens,
        free_tokens=ledger.free * ledger.page_tokens,
        sessions=len(sessions),
        queued_tokens=engine.queued_tokens,
        iteration_estimate_s=engine.pace.estimate_s(1),
        iterations=engine.iteration,
        decode_s_per_block=engine.pace.decode_s_per_block(now_s),
        room_in_s=sessions.room_in_s(now_s),
    )


def progress(sessions: SessionTable, sender: PeerId, message: GetHeld) -> Routed:
    """How far a session has come here; nothing of sessions that are not the sender's."""
    session = SessionId(message.session)
    hops = [hop for hop in sessions.of_session(session) if hop.plan.owner == sender]
    epoch = max((hop.plan.epoch for hop in hops), default=0)
    return Routed(message.call, session, epoch, [held(hop) for hop in hops][:HOPS_MAX])


def held(hop: HopSession) -> Held:
    """What the owner may know."""
    return Held(hop.plan.span.start, hop.inbound.rev, hop.inbound.have, hop.settled_length)


def have(hop: HopSession) -> Have:
    """What the predecessor may do: a hop that waits for room wants nothing yet."""
    is_waiting = hop.is_parked and hop.wants_return
    return hop.inbound.have_message(0 if is_waiting else hop.window_bytes, hop.settled_length)


def broken(outbound: Outbound, error: ShoalError) -> Broken:
    """A link of ours stands still."""
    detail = error.detail[:DETAIL_CHARS_MAX]
    link = (outbound.session, outbound.border, outbound.epoch)
    return Broken(*link, outbound.receiver, error.code, detail)


def no_standby(session: SessionId, start: int, epoch: int, error: ShoalError) -> Failed:
    """We follow a route, but can't be the standby that begins at block `start`."""
    detail = error.detail[:DETAIL_CHARS_MAX]
    return Failed(session, start, epoch, error.code, detail, error.retry_after_s)


def failed(hop: HopSession, error: ShoalError, blame: PeerId | None) -> Failed:
    """A session of ours can't go on here."""
    detail, plan = error.detail[:DETAIL_CHARS_MAX], hop.plan
    where = (plan.session, plan.span.start, plan.epoch)
    return Failed(*where, error.code, detail, error.retry_after_s, blame or b"")
