"""The client of one swarm: opens sessions, watches over the servers they use.

`open_client` is the way in. A client may also be the owner of many sessions at once;
they share the streams to each server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Final

from shoal.base.errors import (
    BadInput,
    PeerMisbehaved,
    PeerUnreachable,
    ProtocolError,
    SessionClosed,
    SessionLost,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import NONCE_BYTES, PeerId, SessionId, session_id, short
from shoal.base.limits import KEEP_PERIOD_S
from shoal.base.spans import Span
from shoal.client import asking
from shoal.client.adapters import AdapterBook, send_route_with_adapter
from shoal.client.chain_session import ChainSession
from shoal.client.config import ClientConfig
from shoal.client.dialling import dial_server
from shoal.client.experience import ExperienceBook
from shoal.client.news import News
from shoal.client.repair import Supervisor
from shoal.client.routing import Followed, RouteFacts, SignedRoute, senders_to, sign_route
from shoal.client.server_link import ServerLink
from shoal.client.session import LOSSES_MAX, SessionState, Trouble
from shoal.client.tending import lose_standby
from shoal.client.watch import Watch
from shoal.discovery.coordinates import Locator, from_wire
from shoal.discovery.directory import Directory
from shoal.link.outbound import Outbound
from shoal.link.pool import SenderPool
from shoal.link.receiver import Answer
from shoal.net.channel import PURPOSE_ROWS_OUT, Channel
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tasks import TaskSet
from shoal.net.transport import Transport
from shoal.plan.coordinates import Coordinate
from shoal.plan.routing import Wanted
from shoal.plan.view import Stage, Standby, SwarmView
from shoal.wire.frames import Buffer
from shoal.wire.messages import (
    Broken,
    Close,
    Entry,
    Failed,
    Fork,
    Leaving,
    Open,
    Room,
    Routed,
    Stale,
)
from shoal.wire.tensors import is_finite

logger = logging.getLogger(__name__)

WINDOW_BYTES: Final = 64 << 20
"""What a last hop may send the client unacknowledged: the client always takes rows."""

LINK_CODES: Final = frozenset({"unreachable", "timeout"})
"""Failures of a link rather than of what stands at its end."""

TERMINAL_CODES: Final = frozenset({"too_long", "bad_input"})
"""Failures that no other server would change, unless another server is to blame."""


class Client:
    """Sessions of one owner in one swarm. Use `open_client`."""

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        swarm_pass: SwarmPass,
        directory: Directory,
        config: ClientConfig,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self.me = identity.peer
        self.experience = ExperienceBook(self._sessions_by_server, Locator(rng, self._where))
        self.rng = rng
        self.patience_s = config.patience_s
        self.on_waiting = config.on_waiting
        self.config = config
        self._identity = identity
        self._transport = transport
        self._swarm_pass = swarm_pass
        self._directory = directory
        self._wall_clock = wall_clock
        self._sessions: dict[SessionId, SessionState] = {}
        self._news = News(directory)
        self._links: dict[PeerId, ServerLink] = {}
        self.adapters = AdapterBook(self.dial)
        self._senders = SenderPool(self._dial_rows, self)
        self._tasks = TaskSet(f"client {short(self.me)}")

    def start(self) -> None:
        """Start the watch over servers that owe us rows."""
        watch = Watch(self._sessions, self.link, self._drop, self._report)
        self._tasks.spawn(watch.run(), "watch")
        self._tasks.spawn(self._keep(), "keep")

    async def stop(self) -> None:
        """Close all sessions and streams."""
        for state in list(self._sessions.values()):
            self.end(state, SessionClosed("the client was closed"))
        await self._tasks.close()
        await self._senders.close()
        for link in self._links.values():
            await link.close()

    @property
    def num_sessions(self) -> int:
        """Sessions that are open now."""
        return len(self._sessions)

    @property
    def num_links(self) -> int:
        """Outgoing links of sessions; 0 when all are closed."""
        return self._senders.num_links

    # --- sessions ----------------------------------------------------------------------

    async def open_session(
        self, encoding: str, span: Span | None = None, *, inner_encoding: str | None = None,
        parent: Fork | None = None, seed: SessionState | None = None, adapter: bytes = b"",
        chain: Sequence[Stage] = (),
    ) -> ChainSession:  # fmt: skip
        """A session over `span` (default: all blocks) with rows in `encoding`.

        `inner_encoding` is that of the links between servers (default: `encoding`); only
        with it may rows be compressed. `adapter` names the LoRA adapter that all rows go
        through: one of `adapters`, or one that servers announce. `chain` is where a dispatcher
        wants it to begin; repairs, and a chain that will not do, are as ever.

        Raises:
            NoRouteError: no chain; names the missing blocks.
            PeerBusy, PeerError: no chain that takes us within the client's patience.
        """
        nonce = self.rng.randbytes(NONCE_BYTES)
        span = span or Span(0, self.config.num_blocks)
        state = SessionState(
            session_id(self.me, nonce), span, encoding, self.config.hidden_size, inner_encoding,
            adapter,
        )  # fmt: skip
        facts = RouteFacts(
            nonce=nonce,
            model=self.config.model,
            opened_ms=int(self._wall_clock() * 1000),
            encoding=encoding,
            inner_encoding=state.inner_encoding,
            parent=parent,
            adapter=adapter,
        )
        if seed is not None and parent is not None:
            state.start_as_fork(seed, parent.rev, parent.length)
        self._sessions[state.id] = state
        wanted = Wanted(
            encoding=encoding,
            inner_encoding=state.inner_encoding,
            adapter=b"" if self.adapters.has(adapter) else adapter,
        )
        supervisor = Supervisor(self, state, facts, wanted, self.config.tending, chain)
        try:
            await supervisor.mend()
        except BaseException:
            self.end(state, SessionClosed("the session was not opened"))
            raise
        self._tasks.spawn(supervisor.run(), f"session {short(state.id)}")
        return ChainSession(self, state)

    def appended(self, state: SessionState) -> None:
        """The session's log grew or was cut: its cursor has work."""
        now_s = asyncio.get_running_loop().time()
        state.progressed_s = max(state.progressed_s, now_s)
        for outbound in (state.outbound, *state.feeds.values()):
            self._senders.wake(outbound)

    def end(self, state: SessionState, error: ShoalError) -> None:
        """Forget the session here and at its servers."""
        if self._sessions.pop(state.id, None) is None:
            return
        state.fail(error)
        state.stirred.set()
        self.dismiss(state, state.peers | state.queued_at)
        for outbound in state.outbounds():
            self._senders.detach(outbound)

    # --- Swarm: what a repair needs ----------------------------------------------------

    def view(self) -> SwarmView:
        """The servers of the model that are known now."""
        shape = (self.config.num_blocks, self.config.hidden_size)
        return self._directory.snapshot().view(self.config.model, shape)

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return when the directory changed, a server has room, or the time is over."""
        await self._news.wait(timeout_s)

    async def install(
        self,
        state: SessionState,
        facts: RouteFacts,
        chain: Sequence[Stage],
        standbys: Sequence[Standby] = (),
    ) -> Followed:
        """Follow `chain` with the next epoch and make it known.

        Returns when all hops answered; standbys are not waited for.
        """
        epoch = state.epoch + 1
        for outbound in state.follow(chain, epoch, self.me, standbys):
            self._senders.detach(outbound)
        servers = sorted(state.servers)
        known = {s.peer: s for s in self.view().servers if s.peer in state.peers}
        for peer, server in known.items():  # a standby's record may be gone when it takes over
            state.classes.setdefault(peer, server.numerics)
        records = [known[peer].record for peer in sorted(known)]
        route = sign_route(self._identity, facts, epoch, chain, records, state.distrusted, standbys)
        for peer in sorted(state.standby_peers - state.servers):
            self._tasks.spawn(self._prepare(state, route, peer), f"standby {short(peer)}")
        links = [self.link(peer) for peer in servers]
        followed = await send_route_with_adapter(
            route, links, senders_to(self.me, chain), self.adapters, state.adapter
        )
        state.held = followed.held
        if state.failure is not None:  # closed meanwhile: nobody may keep it
            self.dismiss(state, servers)
        elif state.epoch == epoch:
            for outbound in state.outbounds():
                self._senders.attach(outbound, dial=True)
            self._offer_have(state)
        return followed

    async def _prepare(self, state: SessionState, route: SignedRoute, peer: PeerId) -> None:
        """Make the route known to a standby."""
        epoch = state.epoch
        followed = await send_route_with_adapter(
            route, [self.link(peer)], frozenset(), self.adapters, state.adapter
        )
        if state.failure is not None or peer not in state.peers:
            self.dismiss(state, [peer])
            return
        for error in followed.refused.values():
            if state.epoch == epoch:
                lose_standby(self.experience, state, peer, error)

    async def held(self, state: SessionState, peer: PeerId) -> Routed:
        """How far the session has come at a peer. Raises ShoalError."""
        return await asking.held(self.link(peer), state.id)

    async def decode_s_per_block(self, peer: PeerId) -> float:
        """What a peer's decode iterations take now; 0: it has done none. Raises ShoalError."""
        return await asking.decode_s_per_block(self.link(peer), self.experience)

    async def answers(self, peer: PeerId) -> bool:
        """Whether the peer answers now, dialling it if need be."""
        is_alive = await asking.answers(self.link(peer))
        if not is_alive:
            self._drop(self.link(peer))
        return is_alive

    def dismiss(self, state: SessionState, peers: Iterable[PeerId]) -> None:
        """Tell servers to forget the session."""
        for peer in sorted(peers):
            if peer in self._links:
                self._links[peer].notify(Close(state.id))

    def link(self, peer: PeerId) -> ServerLink:
        """Our streams to a server."""
        if peer not in self._links:
            self._links[peer] = ServerLink(peer, self.dial, self)
        return self._links[peer]

    # --- streams -----------------------------------------------------------------------

    async def dial(self, peer: PeerId, purpose: str) -> Channel:
        """A new stream to a server. Raises ShoalError."""
        found = self._directory.snapshot().find(peer)
        return await dial_server(self._transport, self._swarm_pass, peer, found, purpose)

    async def _dial_rows(self, peer: PeerId) -> Channel:
        return await self.dial(peer, PURPOSE_ROWS_OUT)

    def _offer_have(self, state: SessionState) -> None:
        """Tell the senders whose receiver we are what we hold, without being asked."""
        for inbound in [state.inbound, *(relay.inbound for relay in state.relays.values())]:
            have = inbound.have_message(WINDOW_BYTES, inbound.have)
            self.link(inbound.predecessor).post(have)

    def _where(self, peer: PeerId) -> Coordinate | None:
        """Where a server says it is."""
        found = self._directory.snapshot().find(peer)
        return None if found is None else from_wire(found.record.coordinate)

    def _sessions_by_server(self) -> Counter[PeerId]:
        """How many of our sessions run over each server now."""
        return Counter(peer for state in self._sessions.values() for peer in state.servers)

    def sessions_at(self, peer: PeerId) -> list[bytes]:
        """Our sessions that run over this server now."""
        states = self._sessions.values()
        return [state.id for state in states if peer in state.peers or peer in state.queued_at]

    # --- rows in: LinkEvents -----------------------------------------------------------

    def on_open(self, peer: PeerId, message: Open) -> Answer | None:
        """A server asks what we hold."""
        state = self._sessions.get(SessionId(message.session))
        inbound = None if state is None else state.receiver_at(message.border, peer)
        if inbound is None:
            return Stale(message.session, message.border, 0 if state is None else state.epoch)
        if not inbound.is_from_predecessor(peer, message.epoch):
            return inbound.stale_message()
        return inbound.have_message(WINDOW_BYTES, inbound.have)

    def on_entry(self, peer: PeerId, entry: Entry, payload: Buffer) -> Answer | None:
        """Rows came back."""
        state = self._sessions.get(SessionId(entry.session))
        if state is None:
            return Stale(entry.session, entry.border, 0)
        inbound = state.receiver_at(entry.border, peer)
        if inbound is None or not inbound.is_from_predecessor(peer, entry.epoch):
            return Stale(entry.session, entry.border, state.epoch)
        is_final = inbound.is_final
        if not state.has_expected_form(entry, is_final):
            self._blame(state, peer, PeerMisbehaved("rows of a wrong size or encoding"))
            return None
        if is_final and not is_finite(entry.encoding, payload):
            self._blame(state, peer, PeerMisbehaved("rows with NaN or infinite values"))
            return None
        now_s = asyncio.get_running_loop().time()
        before = state.received_length
        answer = state.on_entry(peer, entry, payload)
        for relay in state.relays.values():
            self._senders.wake(relay.outbound)
        if state.received_length > before:
            state.advanced(now_s)
            if self.experience.has_failures:
                for server in state.servers:
                    self.experience.served(server, now_s)
        return answer

    def on_broken(self, peer: PeerId, message: Broken) -> None:
        """A server can't reach its successor."""
        state = self._sessions.get(SessionId(message.session))
        if state is None or message.epoch != state.epoch:
            return
        stage = state.standby_at(PeerId(message.peer), message.border)
        if stage is not None and not state.ends_at(peer, message.border):
            return  # none of its business
        if stage is not None:
            detail = f"it can't be fed: {message.detail}"  # which says nothing bad of it
            lose_standby(self.experience, state, stage.peer, SessionLost(detail))
            if message.code in LINK_CODES:
                now_s = asyncio.get_running_loop().time()
                self.experience.pair_failed(peer, stage.peer, now_s)
        for before, successor in pairwise(state.chain if stage is None else ()):
            if (before.peer, successor.peer) == (peer, message.peer):
                self._report(state, state.link_trouble(peer, successor.peer, message.code))

    def on_failed(self, peer: PeerId, message: Failed) -> None:
        """A server can't go on with a session."""
        state = self._sessions.get(SessionId(message.session))
        if state is None or message.epoch != state.epoch or peer not in state.peers:
            return
        error = error_from_code(message.code, message.detail, message.retry_after_s)
        before = state.predecessor(peer, message.start)
        if state.standby_at(peer, message.start) is not None:
            is_fed_badly = message.blame not in (b"", peer)
            if is_fed_badly:
                error = SessionLost(f"it is fed bad rows: {error.detail}")
            lose_standby(self.experience, state, peer, error)
        elif message.code == BadInput.code and before is not None:
            self._blame(state, before, error)  # we only relayed those rows
        elif message.code in TERMINAL_CODES:
            self.end(state, error)
        elif message.code in ("lost", "closed") and state.losses < LOSSES_MAX:
            state.losses += 1
            self._report(state, Trouble(is_out_of_step=True))
        else:
            is_before = before is not None and message.blame in (before, self.me)
            self._blame(state, before if is_before and before else peer, error)

    def on_server_lost(self, peer: PeerId, error: ShoalError) -> None:
        """The streams from a server are gone."""
        logger.info("server lost peer=%s reason=%s", short(peer), error)
        for state in self._sessions.values():
            if peer in state.standby_peers:
                lose_standby(self.experience, state, peer, error)
            if peer in state.servers and not state.is_mending:
                self._report(state, Trouble(lost={peer}))

    def on_room(self, peer: PeerId, message: Room) -> None:
        """A server has room for a session of ours: it tries again at once."""
        state = self._sessions.get(SessionId(message.session))
        if state is not None and peer in state.queued_at:
            self.experience.has_room(peer)
            self._news.call()

    def on_round_trip(self, peer: PeerId, rtt_s: float) -> None:
        """A server answered a Ping."""
        self.experience.round_trip(peer, rtt_s)

    def on_leaving(self, peer: PeerId, message: Leaving) -> None:
        """A server will stop serving blocks: our sessions should be gone by then."""
        logger.info("server leaves peer=%s within_s=%.1f", short(peer), message.within_s)
        if message.start >= message.end:
            raise ProtocolError("a server leaves no blocks")
        until_s = asyncio.get_running_loop().time() + message.within_s
        for state in self._sessions.values():
            if peer in state.peers:
                span = Span(message.start, message.end)
                if state.leaving.get(peer, (None, 0.0))[0] != span:
                    state.tend()
                state.leaving[peer] = (span, until_s)

    # --- rows out: PoolEvents ----------------------------------------------------------

    def on_cursor_moved(self, outbound: Outbound) -> None:
        """Nothing waits for this: the user's steps wait for rows."""

    def on_needs_earlier(self, outbound: Outbound) -> None:
        """Our own log is never trimmed; a relay's is not either."""
        raise ProtocolError("a receiver asks for rows that were never there")

    def on_link_broken(self, peer: PeerId, error: ShoalError, outbounds: list[Outbound]) -> None:
        """We can't send rows to a server."""
        for outbound in outbounds:
            state = self._sessions.get(outbound.session)
            if state is None:
                continue
            if state.feeds.get(peer) is outbound:
                lose_standby(self.experience, state, peer, error)
            elif peer in state.servers:
                self._report(state, Trouble(lost={peer}))

    def _drop(self, link: ServerLink) -> None:
        """The server doesn't answer as it should: everybody who uses it must know."""
        link.drop()
        self.on_server_lost(link.peer, PeerUnreachable("silent or stuck"))

    async def _keep(self) -> None:
        """List our sessions to every server from time to time."""
        while True:
            await asyncio.sleep(KEEP_PERIOD_S)
            for link in self._links.values():
                link.keep()

    def _blame(self, state: SessionState, peer: PeerId, error: ShoalError) -> None:
        logger.warning("peer at fault peer=%s session=%s reason=%s",
                       short(peer), short(state.id), error)  # fmt: skip
        state.last_error = error
        self._report(state, Trouble(bad={peer}))

    def _report(self, state: SessionState, trouble: Trouble) -> None:
        state.report(trouble, asyncio.get_running_loop().time())


@asynccontextmanager
async def open_client(
    identity: Identity,
    transport: Transport,
    swarm_pass: SwarmPass,
    directory: Directory,
    config: ClientConfig,
    *,
    rng: random.Random,
    wall_clock: Callable[[], float],
) -> AsyncIterator[Client]:
    """A running client; everything it opened is closed at the end."""
    client = Client(identity, transport, swarm_pass, directory, config, rng, wall_clock)
    client.start()
    try:
        yield client
    finally:
        await client.stop()
