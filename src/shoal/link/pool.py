"""The senders of one peer: one per receiver, dialled here or adopted when the receiver dials.

A stream that breaks is dialled again once at once (a reset costs one round trip); when
that fails the owner is told and the sender rests until a new route attaches a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from shoal.base.errors import PeerError, ProtocolError, ShoalError
from shoal.base.ids import PeerId
from shoal.link.outbound import Outbound
from shoal.link.sender import RowSender, SenderEvents
from shoal.net.channel import Channel
from shoal.net.tasks import TaskSet

HEALTHY_S = 5.0
"""A stream that breaks again sooner is not dialled a third time."""


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
        self._dialling: set[PeerId] = set()
        self._tasks = TaskSet("senders")

    @property
    def num_links(self) -> int:
        """Links that are attached now."""
        return sum(len(sender.outbounds) for sender in self._senders.values())

    def attach(self, outbound: Outbound, *, dial: bool) -> None:
        """Route this link to its receiver; `dial` unless the receiver dials us."""
        for sender in self._senders.values():
            if sender.peer != outbound.receiver:
                sender.detach(outbound)
        sender = self._sender(outbound.receiver)
        sender.attach(outbound)
        if dial and not sender.is_connected and outbound.receiver not in self._dialling:
            self._dialling.add(outbound.receiver)
            self._tasks.spawn(self._keep_dialled(sender), "dial")

    def detach(self, outbound: Outbound) -> None:
        """Forget this link."""
        for sender in self._senders.values():
            sender.detach(outbound)

    def wake(self, outbound: Outbound) -> None:
        """The link's log grew or was cut."""
        sender = self._senders.get(outbound.receiver)
        if sender is not None:
            sender.wake(outbound)

    async def adopt(self, channel: Channel) -> None:
        """Serve a stream that the receiver dialled, until it breaks."""
        await self._sender(channel.peer).run(channel)

    async def close(self) -> None:
        """End all streams."""
        await self._tasks.close()

    def _sender(self, peer: PeerId) -> RowSender:
        if peer not in self._senders:
            self._senders[peer] = RowSender(peer, self._events)
        return self._senders[peer]

    async def _keep_dialled(self, sender: RowSender) -> None:
        now = asyncio.get_running_loop().time
        error: ShoalError
        broke_at = -HEALTHY_S
        try:
            while True:
                if not sender.outbounds:
                    return
                channel = await self._dial(sender.peer)
                try:
                    await sender.run(channel)
                except (PeerError, ProtocolError):
                    if now() - broke_at < HEALTHY_S:
                        raise
                    broke_at = now()
        except ShoalError as failure:
            error = failure
        finally:
            self._dialling.discard(sender.peer)
        self._events.on_link_broken(sender.peer, error, sender.outbounds)
