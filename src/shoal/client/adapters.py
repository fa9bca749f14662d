"""The LoRA adapters of a client: bringing them to servers, finding those that servers have.

A session names its adapter in its route. A server that lacks it refuses with `AdapterMissing`;
it is then sent the tensors of its blocks, and the route again. So standbys and replacements get
it before they get rows, and a repair never goes on without it. Adapters that only servers have
limit the choice of servers instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from shoal.base.adapters import AdapterName, AdapterPart, adapter_name
from shoal.base.errors import (
    AdapterMissing,
    ConfigError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import PIECE_BYTES_MAX
from shoal.base.spans import Span
from shoal.client.routing import Followed, SignedRoute, send_route
from shoal.client.server_link import ServerLink
from shoal.net.channel import PURPOSE_ADAPTERS, Channel
from shoal.plan.view import SwarmView
from shoal.wire.adapters import AdapterPiece, OfferAdapter, TookAdapter, WantAdapter
from shoal.wire.messages import Error, Message

logger = logging.getLogger(__name__)

STALL_S: Final = 20.0
"""A server that takes no piece or owes an answer for this long is left."""

CALL: Final = 1
"""One offer per stream."""

Dial = Callable[[PeerId, str], Awaitable[Channel]]


class AdapterBook:
    """The adapters that this client can bring to servers, by name."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._adapters: dict[AdapterName, AdapterPart] = {}
        self._users: Counter[AdapterName] = Counter()
        self._locks: dict[PeerId, asyncio.Lock] = {}
        self.sent_bytes = 0
        """Tensor bytes sent to servers."""

    def add(self, adapter: AdapterPart) -> AdapterName:
        """Keep a whole adapter for sessions that name it. As often added, as often removed.

        Raises:
            ConfigError: blocks are missing.
        """
        manifest = adapter.manifest
        if any(block.index not in adapter.blocks for block in manifest.blocks):
            raise ConfigError("an adapter must be whole to be brought to servers")
        name = manifest.name
        self._adapters[name] = adapter
        self._users[name] += 1
        return name

    def remove(self, name: AdapterName) -> None:
        """Sessions that are open must not need it any more."""
        self._users[name] -= 1
        if self._users[name] <= 0:
            del self._users[name]
            self._adapters.pop(name, None)

    def has(self, name: bytes) -> bool:
        """Whether we can bring it."""
        return name in self._adapters

    async def bring(self, peer: PeerId, name: bytes) -> None:
        """Send it to a server, unless it has it. One adapter at a time goes to each server.

        Raises:
            AdapterMissing: we don't have it either.
            AdapterBad: it doesn't fit the model.
            PeerError: no room, no answer, or nonsense.
        """
        adapter = self._adapters.get(AdapterName(name))
        if adapter is None:
            raise AdapterMissing(f"adapter {name.hex()} is neither at {short(peer)} nor here")
        async with self._locks.setdefault(peer, asyncio.Lock()):
            channel = await self._dial(peer, PURPOSE_ADAPTERS)
            try:
                await self._offer(channel, adapter)
            finally:
                channel.close()

    async def _offer(self, channel: Channel, adapter: AdapterPart) -> None:
        manifest = adapter.manifest
        await _send(channel, OfferAdapter(CALL, manifest.name), manifest.text())
        wanted = await _receive(channel)
        if not isinstance(wanted, WantAdapter) or wanted.start > wanted.end:
            raise PeerMisbehaved(f"{short(channel.peer)} does not say what it wants of an adapter")
        if wanted.is_held:
            return
        offset = 0
        for block in manifest.within(Span(wanted.start, wanted.end)):
            view = memoryview(adapter.blocks[block.index])
            for start in range(0, view.nbytes, PIECE_BYTES_MAX):
                piece = view[start : start + PIECE_BYTES_MAX]
                await _send(channel, AdapterPiece(CALL, offset), piece)
                offset += piece.nbytes
        if not isinstance(await _receive(channel), TookAdapter):
            raise PeerMisbehaved(f"{short(channel.peer)} does not say that it took an adapter")
        self.sent_bytes += offset
        logger.info("adapter brought name=%s peer=%s bytes=%d",
                    manifest.name.hex(), short(channel.peer), offset)  # fmt: skip


async def send_route_with_adapter(
    route: SignedRoute,
    links: Iterable[ServerLink],
    receive_from: frozenset[PeerId],
    book: AdapterBook,
    adapter: bytes,
) -> Followed:
    """`send_route`, and again to those who lack the adapter, once they have got it."""
    links = list(links)
    followed = await send_route(route, links, receive_from)
    lacking = [
        link for link in links if isinstance(followed.refused.get(link.peer), AdapterMissing)
    ]
    if not lacking or not book.has(adapter):
        return followed

    async def bring_to(link: ServerLink) -> ShoalError | None:
        try:
            await book.bring(link.peer, adapter)
        except ShoalError as error:
            return error
        return None

    errors = await asyncio.gather(*map(bring_to, lacking))
    refused = {
        peer: error
        for peer, error in followed.refused.items()
        if not isinstance(error, AdapterMissing)
    }
    able = []
    for link, error in zip(lacking, errors, strict=True):
        if error is None:
            able.append(link)
        else:
            refused[link.peer] = error
    again = await send_route(route, able, receive_from)
    return Followed(
        held=followed.held | again.held,
        ready=followed.ready | again.ready,
        refused=refused | again.refused,
    )


def find_adapter(view: SwarmView, text: str) -> AdapterName:
    """The adapter that servers announce under this label, or whose name (32 hex) it is.

    Raises:
        ConfigError: nobody has it, or servers mean different ones.
    """
    by_hash = adapter_name(text)
    announced = {(label, name) for server in view.servers for label, name in server.adapters}
    found = {name for label, name in announced if text == label or name == by_hash}
    if len(found) > 1:
        names = ", ".join(sorted(name.hex() for name in found))
        raise ConfigError(f"servers mean different adapters by {text!r}: choose among {names}")
    if not found:
        labels = sorted({label for label, _ in announced})
        hint = f"servers have {', '.join(labels)}" if labels else "servers have none"
        raise ConfigError(f"no adapter {text!r}: give a directory, or one of theirs ({hint})")
    return AdapterName(found.pop())


async def _send(channel: Channel, message: Message, *payload: bytes | memoryview) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await channel.send(message, *payload)
    except TimeoutError as error:
        raise PeerTimeout(f"{short(channel.peer)} takes no adapter") from error
    except PeerUnreachable:
        await _receive(channel)  # it may have said why
        raise


async def _receive(channel: Channel) -> Message:
    try:
        async with asyncio.timeout(STALL_S):
            answer, _ = await channel.receive()
    except TimeoutError as error:
        raise PeerTimeout(f"{short(channel.peer)} does not answer to an adapter") from error
    if isinstance(answer, Error):
        detail = f"{short(channel.peer)}: {answer.detail}"
        raise error_from_code(answer.code, detail, answer.retry_after_s)
    return answer
