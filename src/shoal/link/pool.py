"""The senders of one peer: one per receiver, dialled here or adopted when the receiver dials.

A stream that breaks is dialled again once at once (a reset costs one round trip); when
that fails the owner is told and the sender rests until a new route attaches a session. Was the
stream silent, the new one must be up soon: one question has gone unanswered already.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from shoal.base.errors import PeerError, PeerTimeout, ProtocolError, ShoalError
from shoal.base.ids import PeerId, short
from shoal.link.hearing import ADOPTED_SILENT_S
from shoal.link.outbound import Outbound
from shoal.link.sender import RowSender, SenderEvents
from shoal.net.channel import Channel
from shoal.net.tasks import TaskSet

HEALTHY_S = 5.0
"""A stream that breaks again sooner is not dialled a third time."""


IDLE_LINK_S = 30.0
"""A stream that carries no session is kept this long for the next one."""

REDIAL_S: Final = 1.0
"""How long a silent peer has for a new stream, or twice as long as it took for the last one."""

DEAD_S: Final = 1.0
"""A path that swallowed a stream and a dial is not tried again so soon: a route that was on its
way meanwhile hears at once what is the matter."""


class PoolEvents(SenderEvents, Protocol):
    """What the owner of the pool wants to hear."""

    def on_link_broken(self, peer: PeerId, error: ShoalError, outbounds: list[Outbound]) -> None:
        """The peer can't be reached; these links to it stand still."""


class SenderPool:
    """Finds or makes the sender for each receiver."""

    def __init__(self, dial: Callable[[PeerId], Awaitable[Channel]], events: PoolEvents) -> None:
        self._dial = dial
        self._events = events
        self._senders: dict[PeerId, RowSender] = {}
        self._by_outbound: dict[Outbound, RowSender] = {}
        self._busy: dict[PeerId, int] = {}
        """Tasks that dial or serve a stream, by peer."""
        self._dialling: set[PeerId] = set()
        self._dead: dict[PeerId, tuple[float, PeerTimeout]] = {}
        """Peers that were silent and took no new stream: when, and what it looked like."""
        self._tasks = TaskSet("senders")

    @property
    def num_links(self) -> int:
        """Links that are attached now."""
        return len(self._by_outbound)

    def attach(self, outbound: Outbound, *, dial: bool) -> None:
        """Route this link to its receiver; `dial` unless the receiver dials us."""
        self.detach(outbound)
        sender = self._sender(outbound.receiver)
        self._by_outbound[outbound] = sender
        sender.attach(outbound)
        if dial and not sender.is_connected and outbound.receiver not in self._dialling:
            self._dialling.add(outbound.receiver)
            self._tasks.spawn(self._keep_dialled(sender), "dial")

    def detach(self, outbound: Outbound) -> None:
        """Forget this link."""
        sender = self._by_outbound.pop(outbound, None)
        if sender is not None:
            sender.detach(outbound)
            self._forget_if_unused(sender)

    def wake(self, outbound: Outbound) -> None:
        """The link's log grew or was cut."""
        sender = self._by_outbound.get(outbound)
        if sender is not None:
            sender.wake(outbound)

    async def adopt(self, channel: Channel) -> None:
        """Serve a stream that the receiver dialled, until it breaks."""
        sender = self._sender(channel.peer)
        async with self._in_use(sender):
            await sender.run(channel, silent_s=ADOPTED_SILENT_S)

    def close_unused(self, peer: PeerId) -> None:
        """End the stream to a peer that is gone, unless a link uses it."""
        sender = self._senders.get(peer)
        if sender is not None and not sender.outbounds:
            sender.close()

    async def close(self) -> None:
        """End all streams."""
        await self._tasks.close()

    def _sender(self, peer: PeerId) -> RowSender:
        if peer not in self._senders:
            self._senders[peer] = RowSender(peer, self._events)
        return self._senders[peer]

    def _forget_if_unused(self, sender: RowSender) -> None:
        if not sender.outbounds and not self._busy.get(sender.peer):
            self._senders.pop(sender.peer, None)

    @asynccontextmanager
    async def _in_use(self, sender: RowSender) -> AsyncIterator[None]:
        self._busy[sender.peer] = self._busy.get(sender.peer, 0) + 1
        try:
            yield
        finally:
            self._busy[sender.peer] -= 1
            if not self._busy[sender.peer]:
                del self._busy[sender.peer]
            self._forget_if_unused(sender)

    async def _keep_dialled(self, sender: RowSender) -> None:
        async with self._in_use(sender):
            try:
                self._check_dead(sender.peer)
                await self._dial_until_broken(sender)
                return
            except ShoalError as failure:
                error = failure
            finally:
                self._dialling.discard(sender.peer)
            self._events.on_link_broken(sender.peer, error, sender.outbounds)

    def _check_dead(self, peer: PeerId) -> None:
        """Raises:
        PeerTimeout: the path swallowed everything a moment ago.
        """
        now_s = asyncio.get_running_loop().time()
        self._dead = {one: dead for one, dead in self._dead.items() if now_s - dead[0] < DEAD_S}
        if peer in self._dead:
            raise self._dead[peer][1]

    async def _dial_until_broken(self, sender: RowSender) -> None:
        """Returns when no session uses the link any more."""
        now = asyncio.get_running_loop().time
        broke_at = -HEALTHY_S
        limit_s: float | None = None
        while sender.outbounds:
            dialled_s = now()
            channel = await self._dial_within(sender.peer, limit_s)
            took_s, limit_s = now() - dialled_s, None
            try:
                await sender.run(channel, idle_s=IDLE_LINK_S)
            except (PeerError, ProtocolError) as error:
                if sender.outbounds and now() - broke_at < HEALTHY_S:
                    raise
                broke_at = now()
                if isinstance(error, PeerTimeout):
                    limit_s = max(REDIAL_S, 2 * took_s)

    async def _dial_within(self, peer: PeerId, limit_s: float | None) -> Channel:
        """A new stream; None: whatever dialling takes.

        Raises:
            PeerTimeout: not within the limit.
            ShoalError: it can't be had.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self._dial(peer)
        except TimeoutError as error:
            dead = PeerTimeout(f"{short(peer)} fell silent and takes no new stream")
            self._dead[peer] = asyncio.get_running_loop().time(), dead
            raise dead from error
