"""The server: takes streams in, wires sessions, links and engine together.

Everything that happens to a session arrives here as an event: a route from its owner,
rows from the predecessor, an answer from the successor, an outcome of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress

from shoal.base.backend import BlockBackend
from shoal.base.errors import (
    BadInput,
    InternalError,
    PeerBusy,
    PeerMisbehaved,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import PeerId, SessionId, short
from shoal.base.spans import Span
from shoal.link.inbound import Verdict
from shoal.link.outbound import Outbound
from shoal.link.pool import SenderPool
from shoal.link.receiver import Answer, RowReceiver
from shoal.net.channel import (
    PURPOSE_ADAPTERS,
    PURPOSE_CONTROL,
    PURPOSE_ROWS_IN,
    PURPOSE_ROWS_OUT,
    PURPOSE_TRAINING,
    Channel,
    accept_channel,
)
from shoal.net.loopback import loopback
from shoal.net.membership import SwarmPass
from shoal.net.tasks import TaskSet
from shoal.net.transport import Stream, Transport
from shoal.server import reports
from shoal.server.adapter_streams import AdapterServer
from shoal.server.adapters import AdapterStore
from shoal.server.config import AddressBook, ServerConfig, StreamService
from shoal.server.control import ControlLink
from shoal.server.controls import Controls
from shoal.server.departures import Departures
from shoal.server.dialling import dial_rows
from shoal.server.engine import Engine
from shoal.server.intake import Intake, compact
from shoal.server.leaving import Farewells
from shoal.server.routes import read_route
from shoal.server.session import HopPlan, HopSession
from shoal.server.sessions import SessionTable
from shoal.server.training import TrainingServer
from shoal.server.upkeep import close_idle, reopen
from shoal.wire.directory import GetRecords, Load, Publish
from shoal.wire.frames import Buffer
from shoal.wire.messages import (
    Alive,
    Broken,
    ControlMessage,
    Entry,
    Failed,
    Fork,
    GetHeld,
    Held,
    Leaving,
    Open,
    Room,
    Route,
    Routed,
    Stale,
)

logger = logging.getLogger(__name__)


class Server:
    """Serves spans of one backend to the clients of one swarm. Use `open_server`."""

    def __init__(
        self,
        backend: BlockBackend,
        transport: Transport,
        swarm_pass: SwarmPass,
        book: AddressBook,
        config: ServerConfig,
    ) -> None:
        self.peer = transport.peer
        self.sessions = SessionTable(
            backend, window_bytes=config.window_bytes, quotas=config.quotas
        )
        self.engine = Engine(backend, self.sessions, self, config.engine)
        self._backend = backend
        self._transport = transport
        self._swarm_pass = swarm_pass
        self._book = book
        self._config = config
        self._intake = Intake(config.quotas, backend.facts, self.sessions, config.window_bytes)
        self._senders = SenderPool(self._dial, self)
        self._receivers: dict[PeerId, RowReceiver] = {}
        self._controls = Controls()
        self._broken = asyncio.Event()
        self._broken_by: Exception | None = None
        self._tasks = TaskSet(f"server {short(self.peer)}")
        self._farewells = Farewells()
        self._departures = Departures(
            config.orphan_grace_s, self._controls.__contains__, self._free, self._tasks
        )
        self.training = TrainingServer(backend, self.engine, self._farewells, config.training)
        self.adapters = AdapterStore(backend, config.adapters, self.sessions.adapters)
        self._services: dict[str, StreamService] = {
            PURPOSE_CONTROL: self._serve_control,
            PURPOSE_ADAPTERS: AdapterServer(self.adapters, backend).serve,
            PURPOSE_TRAINING: self.training.serve,
            PURPOSE_ROWS_OUT: self._serve_rows,
            PURPOSE_ROWS_IN: self._senders.adopt,
            **config.services,
        }

    def start(self) -> None:
        """Start the engine and the watch over idle sessions."""
        self._tasks.spawn(self._run_engine(), "engine")
        idle_s = self._config.idle_session_s
        self._tasks.spawn(close_idle(self.sessions, idle_s, self._forget), "idle")
        self._tasks.spawn(reopen(self._intake, self.on_held_changed), "reopen")

    async def wait_broken(self) -> None:
        """Wait until the server can't go on.

        Raises:
            InternalError: always; what broke the engine.
        """
        await self._broken.wait()
        raise InternalError(f"the engine broke: {self._broken_by!r}")

    async def stop(self) -> None:
        """Stop all tasks and close all streams of ours."""
        await self._tasks.close()
        await self._senders.close()

    @property
    def num_links(self) -> int:
        """Outgoing links of sessions; 0 when all are closed."""
        return self._senders.num_links

    async def drain(self, within_s: float) -> bool:
        """Take nothing new and ask everybody to go; returns whether all went in time."""
        self._farewells.drain(self._backend.facts.span, within_s)
        return await self.leave(Span(0, self._backend.facts.num_blocks), within_s)

    async def leave(self, span: Span, within_s: float, only: Collection[HopSession] = ()) -> bool:
        """Ask the owners of sessions (`only` these) over any of the blocks to move them elsewhere.

        Returns whether all went in time; sessions of owners who are away don't count.
        """
        hops = [
            hop
            for hop in only or self.sessions
            if hop.plan.span.overlap(span) and hop.plan.owner in self._controls
        ]
        logger.info("leaving blocks=%s sessions=%d within_s=%.1f", span, len(hops), within_s)
        for owner in {hop.plan.owner for hop in hops}:
            self._controls.post(owner, Leaving(span.start, span.end, within_s))
        return await self._farewells.wait(hops, within_s)

    def evict_all(self) -> None:
        """Take every session's cache away, as memory pressure would; they return by replay."""
        for hop in self.sessions.park_all():
            self.on_held_changed(hop)
        self.engine.wake()

    async def serve_stream(self, stream: Stream) -> None:
        """Serve one incoming stream (the handler for Transport.listen)."""
        if self._broken_by is not None:
            return  # closes it: everybody must see that nothing works here any more
        try:
            channel, purpose = await accept_channel(stream, self._swarm_pass)
        except ShoalError as error:
            logger.info("stream refused peer=%s reason=%s", short(stream.peer), error)
            return
        service = self._services.get(purpose)
        if service is None:
            await channel.refuse(PeerRefused(f"no streams for {purpose} here"))
            return
        try:
            with self._intake.stream(channel.peer, channel.origin):
                await service(channel)
        except PeerBusy as error:
            logger.info("stream refused peer=%s reason=%s", short(channel.peer), error)
            await channel.refuse(error)
        except (PeerUnreachable, PeerTimeout):
            logger.debug("stream ended peer=%s purpose=%s", short(channel.peer), purpose)
        except ProtocolError as error:
            logger.warning("stream refused peer=%s reason=%s", short(channel.peer), error)
            channel.close()

    async def _serve_control(self, channel: Channel) -> None:
        control = ControlLink(channel, self)
        try:
            with self._controls.holding(control):
                if self._farewells.is_draining and self.sessions.of_owner(channel.peer):
                    control.post(self._farewells.leaving)
                await control.run()
        finally:
            if channel.peer not in self._controls:
                self._departures.left(channel.peer)

    async def _serve_rows(self, channel: Channel) -> None:
        receiver = self._receivers[channel.peer] = RowReceiver(channel, self)
        try:
            await receiver.run()
        finally:
            if self._receivers.get(channel.peer) is receiver:
                del self._receivers[channel.peer]

    async def _serve_loopback(self, channel: Channel) -> None:
        with suppress(PeerUnreachable):  # its other end was closed
            await self._serve_rows(channel)

    async def _dial(self, peer: PeerId) -> Channel:
        if peer == self.peer:
            near, far = loopback(peer)
            self._tasks.spawn(self._serve_loopback(Channel(far)), "loopback")
            return Channel(near)
        return await dial_rows(self._transport, self._book, self._swarm_pass, peer)

    async def route(self, sender: PeerId, message: Route) -> Routed:
        """Follow a route: open, change or confirm our hops of it."""
        plan = read_route(message, sender, self.peer, self._backend.facts, self.sessions.runs)
        for record in message.records:
            self._book.learn(record)
        held: list[Held] = []
        epoch = plan.epoch
        starts = {hop_plan.span.start for hop_plan in plan.hops}
        for old in self.sessions.of_session(plan.session):
            if old.plan.span.start not in starts and old.plan.epoch < plan.epoch:
                self._forget(old)
        refused = list(plan.refused)
        for hop_plan in plan.hops:
            try:
                hop = await self._hop_for(hop_plan, plan.parent)
            except ShoalError as error:
                if not hop_plan.is_standby or len(plan.hops) == 1:
                    raise
                refused.append((hop_plan.span.start, error))
                continue
            held.append(reports.held(hop))
            epoch = max(epoch, hop.plan.epoch)
        for start, why in refused:
            self._tell(sender, reports.no_standby(plan.session, start, plan.epoch, why))
        return Routed(message.call, plan.session, epoch, held)

    def held(self, sender: PeerId, message: GetHeld) -> Routed:
        """How far a session of the sender has come here."""
        return reports.progress(self.sessions, sender, message)

    async def _hop_for(self, plan: HopPlan, parent: Fork | None) -> HopSession:
        hop = self.sessions.find((plan.session, plan.span.start))
        if hop is None or (plan.epoch > hop.plan.epoch and not hop.plan.is_continued_by(plan)):
            hop = await self._open_hop(plan, parent)
        elif plan.epoch > hop.plan.epoch:
            for outbound in hop.follow(plan):
                self._senders.detach(outbound)
        self._follow(hop, plan.epoch)
        return hop

    async def _open_hop(self, plan: HopPlan, parent: Fork | None) -> HopSession:
        now_s = asyncio.get_running_loop().time()
        await self.adapters.make_ready(plan.adapter)
        async with self.engine.exclusive():
            self._farewells.check_taking()
            old = self.sessions.find((plan.session, plan.span.start))
            if old is not None and old.plan.epoch >= plan.epoch:
                return old
            adapter = self.adapters.find(plan.owner, plan.adapter)
            if old is not None:
                self._forget(old)
            origin = self._controls.origin(plan.owner)
            hop = self.sessions.open(plan, parent, now_s, adapter, origin)
        self._call_waiting()
        logger.info("session opened session=%s span=%s epoch=%d held=%d",
                    short(plan.session), plan.span, plan.epoch, hop.inbound.have)  # fmt: skip
        return hop

    def _follow(self, hop: HopSession, epoch: int) -> None:
        if hop.plan.epoch != epoch:
            return  # an old route came late; the highest epoch stays in force
        for outbound in hop.outbounds:
            self._senders.attach(outbound, dial=outbound.receiver != hop.plan.owner)
        self.on_held_changed(hop)
        self.engine.wake()

    def close_session(self, sender: PeerId, session: SessionId) -> None:
        """The owner is done with a session."""
        self.sessions.line.leave(session, sender)
        for hop in self.sessions.of_session(session):
            if hop.plan.owner == sender:
                self._forget(hop)

    def keep_sessions(self, sender: PeerId, sessions: Collection[bytes]) -> None:
        """The owner knows of these sessions and no others."""
        self.sessions.line.keep_only(sender, sessions)
        for hop in self.sessions.of_owner(sender):
            if hop.plan.session not in sessions:
                self._forget(hop)

    def alive(self, call: int) -> Alive:
        """How the engine is doing."""
        return reports.alive(self.engine, call, asyncio.get_running_loop().time())

    def load(self, call: int) -> Load:
        """How full the server is."""
        return reports.load(self.engine, self.sessions, call, asyncio.get_running_loop().time())

    def directory_answer(self, message: GetRecords | Publish) -> ControlMessage:
        """Records asked for or handed over."""
        return self._book.answer(message)

    def on_open(self, peer: PeerId, message: Open) -> Answer | None:
        """A sender asks what is held."""
        hop = self.sessions.find((SessionId(message.session), message.border))
        if hop is None:
            return Stale(message.session, message.border, 0)
        if not hop.inbound.is_from_predecessor(peer, message.epoch):
            return hop.inbound.stale_message()
        return reports.have(hop)

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Answer | None:
        """Rows arrived."""
        hop = self.sessions.find((SessionId(entry.session), entry.border))
        if hop is None:
            return Stale(entry.session, entry.border, 0)
        if not hop.inbound.is_from_predecessor(peer, entry.epoch):
            return hop.inbound.stale_message()
        hop.used_s = asyncio.get_running_loop().time()
        if hop.is_parked:
            hop.wants_return = True
            self.engine.wake()
            return None
        if not self._intake.takes(hop, entry.payload_bytes):
            return None  # dropped; `on_worked_off` asks for them again
        try:
            self._intake.check_entry(entry, hop.plan.encoding)
        except ShoalError as error:
            self._fail(hop, error, blame=peer if isinstance(error, BadInput) else None)
            return None
        admission = hop.admit(peer, entry, compact(payload))
        if admission.cuts:
            self.on_output(hop)
        self.engine.wake()
        match admission.verdict:
            case Verdict.GAP:
                return hop.inbound.gap_message()
            case Verdict.HELD:
                return hop.inbound.ack_message(hop.settled_length)
            case _:
                return None

    def on_cursor_moved(self, outbound: Outbound) -> None:
        """Rows were sent or acknowledged: a session that ran ahead may run again."""
        hop = self._hop_of(outbound)
        if hop is not None and hop.queue:
            self.engine.wake()

    def on_needs_earlier(self, outbound: Outbound) -> None:
        """The successor needs rows that our log no longer holds: make them anew.

        For a standby nobody's rows are made anew: its owner hears that it can't be fed.
        """
        hop = self._hop_of(outbound)
        if hop is not None and outbound is not hop.outbound:
            self._senders.detach(outbound)
            error = SessionLost("the log no longer reaches back to where a standby begins")
            self._tell(hop.plan.owner, reports.broken(outbound, error))
        elif hop is not None:
            logger.info("log too short session=%s from=%d", short(hop.key[0]), outbound.cursor)
            hop.lose_log(outbound.cursor)
            self.on_held_changed(hop)
            self.engine.wake()

    def on_link_broken(self, peer: PeerId, error: ShoalError, outbounds: list[Outbound]) -> None:
        """A successor can't be reached: its sessions' owners decide."""
        logger.warning("link broken to=%s sessions=%d reason=%s",
                       short(peer), len(outbounds), error)  # fmt: skip
        for outbound in outbounds:
            hop = self._hop_of(outbound)
            if hop is not None:
                self._tell(hop.plan.owner, reports.broken(outbound, error))

    def on_output(self, hop: HopSession) -> None:
        """The log grew or was cut."""
        for outbound in hop.outbounds:
            self._senders.wake(outbound)

    def on_worked_off(self, hop: HopSession) -> None:
        """Queued rows were worked off."""
        length = hop.take_ack()
        if length is not None:
            self._answer(hop, hop.inbound.ack_message(length))

    def on_held_changed(self, hop: HopSession) -> None:
        """Tell the predecessor what we hold now.

        Not for a hop that was parked while idle: it would be replayed at once. Its next
        row makes it return.
        """
        if not hop.is_parked or hop.wants_return:
            self._answer(hop, reports.have(hop))

    def on_failed(self, hop: HopSession, error: ShoalError) -> None:
        """The engine can't go on with this session; bad rows are the predecessor's."""
        self._fail(hop, error, blame=hop.plan.predecessor if isinstance(error, BadInput) else None)

    def _fail(self, hop: HopSession, error: ShoalError, blame: PeerId | None) -> None:
        if blame is not None and blame != hop.plan.owner:
            error = PeerMisbehaved(f"{short(blame)} sent bad rows: {error.detail}")
        logger.warning("session failed session=%s span=%s reason=%s",
                       short(hop.plan.session), hop.plan.span, error)  # fmt: skip
        self._tell(hop.plan.owner, reports.failed(hop, error, blame))
        self._forget(hop)

    def _forget(self, hop: HopSession) -> None:
        for outbound in hop.outbounds:
            self._senders.detach(outbound)
        self.sessions.close(hop)
        self._farewells.went(hop)
        self.sessions.line.departed(asyncio.get_running_loop().time())
        self._call_waiting()
        if not self.sessions.of_owner(hop.plan.owner):
            self._intake.forget(hop.plan.owner)
        self.engine.wake()

    def _call_waiting(self) -> None:
        """Tell the first in line that there is room; when it came, the next."""
        for owner, session in self.sessions.called(asyncio.get_running_loop().time()):
            self._tell(owner, Room(session))

    def _tell(self, owner: PeerId, message: Broken | Failed | Leaving | Room) -> None:
        self._controls.post(owner, message)

    def _answer(self, hop: HopSession, answer: Answer) -> None:
        receiver = self._receivers.get(hop.plan.predecessor)
        if receiver is not None:
            receiver.post(answer)

    def _hop_of(self, outbound: Outbound) -> HopSession | None:
        hop = self.sessions.sending(outbound.session, outbound.border)
        return hop if hop is not None and outbound in hop.outbounds else None

    async def _run_engine(self) -> None:
        """A server whose engine broke must not look alive: it closes what leads into it."""
        try:
            await self.engine.run()
        except Exception as error:
            logger.exception("engine broke sessions=%d", len(self.sessions))
            self._broken_by = error
            self._controls.close_all()
            for receiver in self._receivers.values():
                receiver.close()
            self._broken.set()

    def _free(self, client: PeerId) -> None:
        """The client is gone: its sessions, its places in the line, its streams."""
        self.keep_sessions(client, ())
        receiver = self._receivers.get(client)
        if receiver is not None and not self.sessions.has_predecessor(client):
            receiver.close()
        self._senders.close_unused(client)


ServerMaker = Callable[[BlockBackend, Transport, SwarmPass, AddressBook, ServerConfig], Server]


@asynccontextmanager
async def open_server(
    backend: BlockBackend,
    transport: Transport,
    swarm_pass: SwarmPass,
    book: AddressBook,
    config: ServerConfig | None = None,
    on_start: Callable[[Server], None] | None = None,
    make: ServerMaker = Server,
) -> AsyncIterator[Server]:
    """A running server; give its `serve_stream` to `transport.listen`."""
    server = make(backend, transport, swarm_pass, book, config or ServerConfig())
    server.start()
    if on_start is not None:
        on_start(server)
    try:
        yield server
    finally:
        await server.stop()
