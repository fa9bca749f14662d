"""A server that says what happens to it, for a trace. See `events.py` for what it says.

Recording is a layer around `Server`, which knows nothing of it and costs nothing without it.
"""

from __future__ import annotations

from typing import Literal

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId, SessionId, short
from shoal.link.outbound import Outbound
from shoal.link.receiver import Answer
from shoal.net.channel import Channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.server.config import AddressBook, ServerConfig
from shoal.server.events import (
    TRACE_VERSION,
    Arrived,
    Began,
    Closed,
    Ended,
    Failed,
    Holds,
    Linked,
    Ran,
    Recorder,
    Routed,
    SessionNames,
    session_name,
)
from shoal.server.server import Server
from shoal.server.session import HopSession
from shoal.wire.frames import Buffer
from shoal.wire.messages import Ack, Entry, Gap, Route, Stale, decode_route_body
from shoal.wire.messages import Routed as RoutedAnswer
from shoal.wire.tensors import row_bytes


def began(peer: PeerId, facts: BackendFacts, config: ServerConfig, boot_s: float) -> Began:
    """The first line of a server's trace; `boot_s` is the wall clock's time."""
    return Began(
        shoal_trace=TRACE_VERSION,
        boot_s=round(boot_s, 6),
        peer=short(peer),
        start=facts.span.start,
        end=facts.span.end,
        num_blocks=facts.num_blocks,
        cache_tokens=facts.cache_tokens,
        row_bytes=row_bytes("float32", facts.hidden_size),
        window_bytes=config.window_bytes,
        run_ahead_bytes=config.engine.run_ahead_bytes,
        log_bytes_per_session=config.engine.log_bytes_per_session_max,
        log_bytes=config.quotas.log_bytes_max,
        budget_tokens=config.engine.budget_tokens,
    )


class RecordedServer(Server):
    """A server whose events go to a recorder."""

    def __init__(
        self,
        backend: BlockBackend,
        transport: Transport,
        swarm_pass: SwarmPass,
        book: AddressBook,
        config: ServerConfig,
        recorder: Recorder,
    ) -> None:
        super().__init__(backend, transport, swarm_pass, book, config)
        self._recorder = recorder
        self._names = SessionNames()
        self.sessions.on_parked = self._on_parked

    async def stop(self) -> None:
        """Stop; the trace says that it was on purpose."""
        self._recorder.record(Ended())
        await super().stop()

    # --- streams -------------------------------------------------------------------

    async def _serve_control(self, channel: Channel) -> None:
        self._linked(channel.peer, "control")
        try:
            await super()._serve_control(channel)
        finally:
            self._linked(channel.peer, "control-end")

    async def _serve_rows(self, channel: Channel) -> None:
        self._linked(channel.peer, "rows")
        try:
            await super()._serve_rows(channel)
        finally:
            self._linked(channel.peer, "rows-end")

    async def _dial(self, peer: PeerId) -> Channel:
        channel = await super()._dial(peer)
        self._linked(peer, "dialled")
        return channel

    def on_link_broken(self, peer: PeerId, error: ShoalError, outbounds: list[Outbound]) -> None:
        """A successor can't be reached."""
        self._linked(peer, "broken", error.code, len(outbounds))
        super().on_link_broken(peer, error, outbounds)

    def _linked(
        self,
        peer: PeerId,
        what: Literal["dialled", "broken", "rows", "rows-end", "control", "control-end"],
        code: str = "",
        links: int = 0,
    ) -> None:
        self._recorder.record(Linked(short(peer), what, code, links))

    # --- sessions --------------------------------------------------------------------

    async def route(self, sender: PeerId, message: Route) -> RoutedAnswer:
        """Follow a route."""
        answer = await super().route(sender, message)
        body = decode_route_body(message.body)
        parent = body.parent
        self._recorder.record(
            Routed(
                s=self._names.of(SessionId(answer.session)),
                owner=short(sender),
                epoch=body.epoch,
                hops=[(short(hop.peer), hop.start, hop.end) for hop in body.hops],
                opened_ms=body.opened_ms,
                held=[(held.start, held.rev, held.length) for held in answer.held],
                parent="" if parent is None else session_name(parent.session),
                parent_length=0 if parent is None else parent.length,
                in_force=0 if answer.epoch == body.epoch else answer.epoch,
                standbys=[(short(one.peer), one.start, one.end) for one in body.standbys],
            )
        )
        return answer

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Answer | None:
        """Rows arrived."""
        answer = super().on_entry(peer, entry, payload)
        is_stale = isinstance(answer, Stale)  # maybe a stranger's invention: not remembered
        name = session_name(entry.session) if is_stale else self._names.of(SessionId(entry.session))
        self._recorder.record(
            Arrived(
                s=name,
                at=entry.border,
                epoch=entry.epoch,
                rev=entry.rev,
                pos=entry.position,
                n=entry.count,
                bytes=entry.payload_bytes,
                call=0 if entry.call_count == entry.count else entry.call_count,
                want=entry.want,
                cuts=[(cut.rev, cut.position) for cut in entry.cuts],
                answer=_word(answer),
            )
        )
        return answer

    def on_output(self, hop: HopSession) -> None:
        """The log grew."""
        super().on_output(hop)
        self._recorder.record(
            Ran(
                s=self._names.of(hop.plan.session),
                at=hop.plan.span.start,
                end=hop.log.end,
                cache=hop.settled_length,
                log_bytes=hop.log.num_bytes,
            )
        )

    def on_held_changed(self, hop: HopSession) -> None:
        """Tell the predecessor what is held now."""
        super().on_held_changed(hop)
        if not hop.is_parked:
            self._holds(hop)

    def _on_parked(self, hop: HopSession) -> None:
        self._holds(hop)

    def _holds(self, hop: HopSession) -> None:
        self._recorder.record(
            Holds(
                s=self._names.of(hop.plan.session),
                at=hop.plan.span.start,
                epoch=hop.plan.epoch,
                rev=hop.inbound.rev,
                have=hop.inbound.have,
                log_start=hop.log.start,
                is_evicted=hop.is_parked,
            )
        )

    # --- ends ------------------------------------------------------------------------

    def _fail(self, hop: HopSession, error: ShoalError, blame: PeerId | None) -> None:
        self._recorder.record(
            Failed(
                s=self._names.of(hop.plan.session),
                at=hop.plan.span.start,
                epoch=hop.plan.epoch,
                code=error.code,
                blame="" if blame is None else short(blame),
            )
        )
        super()._fail(hop, error, blame)

    def _forget(self, hop: HopSession) -> None:
        session = hop.plan.session
        self._recorder.record(Closed(self._names.of(session), hop.plan.span.start))
        super()._forget(hop)
        self._names.forget(session)

    async def _run_engine(self) -> None:
        await super()._run_engine()
        self._recorder.record(Ended("engine"))


def _word(answer: Answer | None) -> str:
    match answer:
        case Gap():
            return "gap"
        case Stale():
            return "stale"
        case Ack():
            return "ack"
        case _:
            return ""
