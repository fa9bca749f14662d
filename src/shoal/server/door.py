"""What a server answers while its model still loads: who is here, and that it lives.

Two servers that start at the same time can so learn of each other. Everything else is
refused as busy; when the server opens, the waiting are let go and come back by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Final

from shoal.base.backend import BackendFacts
from shoal.base.errors import PeerBusy, PeerTimeout, PeerUnreachable, ProtocolError
from shoal.base.ids import PeerId, SessionId, short
from shoal.net.channel import PURPOSE_CONTROL, Channel, accept_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Stream
from shoal.server.config import AddressBook, StreamService
from shoal.server.control import ControlLink
from shoal.server.server import Server
from shoal.wire.directory import GetRecords, Load, Publish
from shoal.wire.messages import Alive, ControlMessage, GetHeld, Route, Routed

logger = logging.getLogger(__name__)

LOADING_RETRY_S: Final = 2.0
"""When to come back to a server that still loads."""


class Door:
    """Takes streams from the first moment; hands them to the server once there is one."""

    def __init__(
        self,
        swarm_pass: SwarmPass,
        book: AddressBook,
        facts: BackendFacts,
        services: Mapping[str, StreamService] | None = None,
    ) -> None:
        self._swarm_pass = swarm_pass
        self._book = book
        self._facts = facts
        self._services = services or {}
        """What is served already, by purpose."""
        self._server: Server | None = None
        self._waiting: set[Channel] = set()

    def open(self, server: Server) -> None:
        """From now on every stream is the server's."""
        self._server = server
        for channel in self._waiting:
            channel.close()

    async def serve_stream(self, stream: Stream) -> None:
        """Serve one incoming stream (the handler for Transport.listen)."""
        if self._server is not None:
            await self._server.serve_stream(stream)
            return
        channel, purpose = await accept_channel(stream, self._swarm_pass)
        service = self._services.get(purpose)
        if purpose != PURPOSE_CONTROL and service is None:
            await channel.refuse(_still_loading())
            return
        try:
            if service is not None:
                await service(channel)
            else:
                await self._answer_control(channel)
        except (PeerUnreachable, PeerTimeout):
            logger.debug("stream ended peer=%s", short(channel.peer))
        except ProtocolError as error:
            await channel.refuse(error)

    async def _answer_control(self, channel: Channel) -> None:
        self._waiting.add(channel)
        try:
            await ControlLink(channel, self).run()
        finally:
            self._waiting.discard(channel)

    # --- ControlEvents -----------------------------------------------------------------

    async def route(self, sender: PeerId, message: Route) -> Routed:
        """Refuse: there are no blocks yet."""
        raise _still_loading()

    def close_session(self, sender: PeerId, session: SessionId) -> None:
        """There are no sessions."""

    def keep_sessions(self, sender: PeerId, sessions: Collection[bytes]) -> None:
        """There are no sessions."""

    def alive(self, call: int) -> Alive:
        """The process lives."""
        return Alive(call, 0, 0.0, 0.0, 0.0)

    def held(self, sender: PeerId, message: GetHeld) -> Routed:
        """There are no sessions."""
        return Routed(message.call, message.session, 0, [])

    def load(self, call: int) -> Load:
        """Nothing can be taken yet."""
        return Load(call, self._facts.cache_tokens, 0, 0, 0, 0.0)

    def directory_answer(self, message: GetRecords | Publish) -> ControlMessage:
        """Records asked for or handed over."""
        return self._book.answer(message)


def _still_loading() -> PeerBusy:
    return PeerBusy("still loading its model", retry_after_s=LOADING_RETRY_S)
