"""A client without weights: head servers embed, run the chain, and choose.

What is kept here is what decides a text: token ids, in which calls they were run, the seed and
the position. So a head server may die at any moment: another one is sent the tokens so far and
goes on with the same text, since a choice depends on (row, options, position) alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import (
    ConfigError,
    NoRouteError,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, SessionId, short
from shoal.client.head_stream import HeadStream
from shoal.client.thin_session import ThinSession
from shoal.client.waiting import OnWaiting, Waiting
from shoal.discovery.directory import Directory
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_HEAD, Channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.plan.heads import HeadOffer, choose_head
from shoal.plan.view import SwarmView

logger = logging.getLogger(__name__)

AVOID_S: Final = 5.0
"""A head server that failed is asked again after this, or when nobody else is left."""

RETRY_S: Final = 0.5
"""Between two rounds through all head servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinConfig:
    """What a thin client is about."""

    model: str
    """The model's hash, as the servers' records name it."""
    num_blocks: int
    hidden_size: int
    vocab_size: int
    patience_s: float = 60.0
    """How long a question looks for a head server that can answer."""
    encoding: str = ""
    """Of the rows along the chain; empty: each head server's own."""
    is_compressed: bool = False
    """Whether servers may send each other compressed rows."""
    on_waiting: OnWaiting | None = None


class ThinClient:
    """Opens sessions at head servers. Use `open_thin_client`."""

    def __init__(
        self,
        transport: Transport,
        swarm_pass: SwarmPass,
        directory: Directory,
        config: ThinConfig,
        rng: random.Random,
    ) -> None:
        self.config = config
        self.rng = rng
        self._transport = transport
        self._swarm_pass = swarm_pass
        self._directory = directory
        self._streams: dict[PeerId, HeadStream] = {}
        self._avoid_until: dict[PeerId, float] = {}
        self._sessions: dict[bytes, ThinSession] = {}
        self._clock = asyncio.get_running_loop().time

    @property
    def num_sessions(self) -> int:
        """Sessions that are open now."""
        return len(self._sessions)

    def view(self) -> SwarmView:
        """The servers of the model that are known now."""
        shape = (self.config.num_blocks, self.config.hidden_size)
        return self._directory.snapshot().view(self.config.model, shape)

    def offers(self) -> list[HeadOffer]:
        """Who has a head now, in an order of chance."""
        found = [
            HeadOffer(
                peer=PeerId(one.record.peer),
                numerics=one.record.head,
                is_leaving=one.record.state != "online",
            )
            for one in self._directory.snapshot().records
            if one.record.model == self.config.model and one.record.head
        ]
        self.rng.shuffle(found)
        return found

    async def open_session(self, adapter: bytes = b"") -> ThinSession:
        """A session without tokens; nothing is sent yet.

        `adapter` names a LoRA adapter that servers of all blocks have.

        Raises:
            NoRouteError: no server has a head.
        """
        session = ThinSession(self, self.rng.randbytes(16), adapter)
        if not self.offers():
            await self._wait_for_offers(session.id)
        self._sessions[session.id] = session
        return session

    def forget(self, session: ThinSession) -> None:
        """The session was closed."""
        self._sessions.pop(session.id, None)

    def adopt(self, session: ThinSession) -> None:
        """A fork of a session of ours."""
        self._sessions[session.id] = session

    async def close(self) -> None:
        """Close all sessions and streams."""
        for session in list(self._sessions.values()):
            session.close()
        for stream in self._streams.values():
            await stream.close()

    # --- what sessions need ------------------------------------------------------------

    async def stream_for(
        self, numerics: str, tried: Collection[PeerId], preferred: PeerId | None = None
    ) -> HeadStream | None:
        """A stream to a head server that was not tried; None: all were.

        Those that can't be dialled count as tried.
        """
        avoided = set(tried)
        while True:
            peer = preferred if preferred not in avoided else None
            if peer is None:
                peer = choose_head(
                    self.offers(), avoid=avoided | self._avoided(avoided), numerics=numerics,
                    sessions=self._load(),
                )  # fmt: skip
            if peer is None:
                return None
            stream = self._streams.setdefault(peer, HeadStream(peer, self._dial))
            try:
                await stream.open()
            except (PeerError, ProtocolError) as error:
                self.failed(peer, error)
                avoided.add(peer)
                preferred = None
                continue
            return stream

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """Don't ask this one for a while, if there are others."""
        logger.info("head server failed peer=%s reason=%s", short(peer), error)
        until_s = self._clock() + max(AVOID_S, error.retry_after_s or 0.0)
        self._avoid_until[peer] = until_s

    def class_of(self, peer: PeerId) -> str:
        """The numerics class of its head; empty: it has none."""
        found = self._directory.snapshot().find(peer)
        return "" if found is None else found.record.head

    async def wait_for_news(self) -> None:
        """Return when the directory changed, or after a while."""
        version = self._directory.snapshot().version
        try:
            async with asyncio.timeout(RETRY_S):
                await self._directory.changed(version)
        except TimeoutError:
            return

    def _avoided(self, tried: Collection[PeerId]) -> set[PeerId]:
        """Who failed lately; nobody, if that would leave none."""
        now_s = self._clock()
        failed = {peer for peer, until_s in self._avoid_until.items() if until_s > now_s}
        known = {offer.peer for offer in self.offers()} - set(tried)
        return failed if known - failed else set()

    def _load(self) -> Counter[PeerId]:
        return Counter(
            session.head for session in self._sessions.values() if session.head is not None
        )

    async def _wait_for_offers(self, session: SessionId) -> None:
        since_s, tell = self._clock(), self.config.on_waiting or _tell_nobody
        until_s = since_s + self.config.patience_s
        told = Waiting(
            missing=(), lost=(), reason="no server with a head (shoal serve --with-head)",
            since_s=since_s, deadline_s=until_s,
        )  # fmt: skip
        try:
            while not self.offers():
                if self._clock() >= until_s:
                    raise NoRouteError(
                        "no server has a head for thin clients: start one with shoal serve "
                        "--with-head, or leave --thin out"
                    )
                tell(session, told)
                await self.wait_for_news()
        finally:
            tell(session, None)

    async def _dial(self, peer: PeerId) -> Channel:
        found = self._directory.snapshot().find(peer)
        error: ShoalError = PeerUnreachable(f"no record of peer {short(peer)}")
        for text in found.record.addresses if found is not None else ():
            try:
                return await open_channel(
                    self._transport, parse_address(text), PURPOSE_HEAD, self._swarm_pass
                )
            except (PeerError, ProtocolError, ConfigError) as failure:
                error = failure
        raise error


def _tell_nobody(session: SessionId, waiting: Waiting | None) -> None:
    """Nobody wants to know."""


@asynccontextmanager
async def open_thin_client(
    transport: Transport,
    swarm_pass: SwarmPass,
    directory: Directory,
    config: ThinConfig,
    rng: random.Random,
) -> AsyncIterator[ThinClient]:
    """A thin client inside the context."""
    client = ThinClient(transport, swarm_pass, directory, config, rng)
    try:
        yield client
    finally:
        await client.close()
