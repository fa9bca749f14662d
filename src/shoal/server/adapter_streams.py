"""Taking adapters from clients: one stream brings one after the other.

The pieces of one adapter come in order and are checked against the manifest as a whole before
anything is loaded. What is on its way counts against the client's quota from the offer on, so
it must come at a least rate: a trickle would keep room from everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from shoal.base.adapters import (
    AdapterManifest,
    AdapterName,
    AdapterPart,
    check_block_in_steps,
)
from shoal.base.backend import BlockBackend
from shoal.base.errors import (
    AdapterBad,
    PeerBusy,
    PeerRefused,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import PIECE_BYTES_MAX
from shoal.base.spans import Span
from shoal.net.channel import Channel, error_message
from shoal.net.origin import Origin
from shoal.server.adapters import AdapterStore
from shoal.server.patience import Patience
from shoal.server.shares import left_for
from shoal.server.weights import turn_away
from shoal.wire.adapters import AdapterPiece, OfferAdapter, TookAdapter, WantAdapter
from shoal.wire.messages import Message

logger = logging.getLogger(__name__)

STREAMS_PER_PEER_MAX: Final = 2
"""One in use, and one that broke and is not noticed yet."""

STREAMS_MAX: Final = 16
"""Streams at once; each holds up to one adapter that is not loaded yet."""

BUSY_RETRY_S: Final = 2.0

IDLE_S: Final = 30.0
"""A stream is closed after so much waiting for its peer; what it sends buys more."""


class AdapterServer:
    """Serves adapter streams into a store."""

    def __init__(self, store: AdapterStore, backend: BlockBackend) -> None:
        self._store = store
        self._backend = backend
        self._streams: dict[Channel, Origin | None] = {}
        """Those that are open, and where they come from."""

    async def serve(self, channel: Channel) -> None:
        """Take adapters on one stream until it ends.

        Raises:
            PeerUnreachable, PeerTimeout: it ended, or nothing comes.
            ProtocolError: nonsense came.
        """
        if not self._store.limits.bytes_max:
            await turn_away(channel, PeerRefused("takes no adapters (see --adapter-memory)"))
            return
        if not self._has_place(channel):
            busy = PeerBusy("takes enough adapters now", retry_after_s=BUSY_RETRY_S)
            await turn_away(channel, busy)
            return
        self._streams[channel] = channel.origin
        patience = Patience(IDLE_S)
        try:
            while True:
                await self._take_one(channel, patience)
        except ProtocolError as error:
            await channel.refuse(error)
            raise
        finally:
            del self._streams[channel]
            channel.close()

    def _has_place(self, channel: Channel) -> bool:
        """Whether there is one for its peer, for its address, and at all."""
        left_at_address = left_for(
            channel.origin, [(origin, 1) for origin in self._streams.values()], total=STREAMS_MAX,
            share=self._store.limits.address_share, per_client=STREAMS_PER_PEER_MAX,
        )  # fmt: skip
        num_of_peer = sum(1 for one in self._streams if one.peer == channel.peer)
        return (
            len(self._streams) < STREAMS_MAX
            and num_of_peer < STREAMS_PER_PEER_MAX
            and left_at_address > 0
        )

    async def _take_one(self, channel: Channel, patience: Patience) -> None:
        """One offer, from the first message to the answer."""
        offer, payload = await _receive(channel, patience)
        if not isinstance(offer, OfferAdapter):
            raise ProtocolError(f"{type(offer).__name__} where an adapter is offered")
        name, owner, span = AdapterName(offer.name), channel.peer, self._backend.facts.span
        if self._store.holds(owner, name):
            held = WantAdapter(offer.call, span.start, span.end, is_held=True)
            await _send(channel, patience, held)
            return
        try:
            manifest = await self._store.admit(owner, name, bytes(payload), channel.origin)
        except ShoalError as error:
            logger.info("adapter refused owner=%s reason=%s", short(owner), error)
            await _send(channel, patience, error_message(error, offer.call))
            return
        try:
            await _send(channel, patience, WantAdapter(offer.call, span.start, span.end))
            data = await _pieces(channel, patience, offer.call, manifest.num_bytes(span))
            answer = await self._loaded(owner, offer.call, manifest, span, data)
        finally:
            self._store.give_up(owner, name)
        if isinstance(answer, TookAdapter):
            patience.renew()
        await _send(channel, patience, answer)

    async def _loaded(
        self, owner: PeerId, call: int, manifest: AdapterManifest, span: Span, data: bytearray
    ) -> Message:
        try:
            part = await _checked(manifest, span, data)
            await self._store.take(owner, part, span)
        except ShoalError as error:
            logger.info("adapter refused owner=%s reason=%s", short(owner), error)
            return error_message(error, call)
        return TookAdapter(call)


async def _pieces(channel: Channel, patience: Patience, call: int, num_bytes: int) -> bytearray:
    """All tensor bytes of one adapter. Memory grows as they come."""
    data = bytearray()
    while len(data) < num_bytes:
        message, payload = await _receive(channel, patience)
        if not isinstance(message, AdapterPiece) or message.call != call:
            raise ProtocolError(f"{type(message).__name__} where pieces of an adapter come")
        left = num_bytes - len(data)
        if message.offset != len(data) or not 0 < payload.nbytes <= min(left, PIECE_BYTES_MAX):
            raise ProtocolError(
                f"{payload.nbytes} bytes from {message.offset} of an adapter, expected up to "
                f"{min(left, PIECE_BYTES_MAX)} from {len(data)}"
            )
        data += payload
        patience.earn(payload.nbytes)
    return data


async def _checked(manifest: AdapterManifest, span: Span, data: bytearray) -> AdapterPart:
    """The part whose bytes these are. After each millisecond others have their turn.

    Raises:
        AdapterBad: they don't have the hashes of the manifest.
    """
    view, at = memoryview(data), 0
    blocks: dict[int, memoryview] = {}
    for block in manifest.within(span):
        end = at + manifest.block_bytes(block)
        blocks[block.index] = view[at:end]
        at = end
        for _ in check_block_in_steps(manifest, block, blocks[block.index]):
            await asyncio.sleep(0)
    if at != len(data):
        raise AdapterBad(f"{len(data)} bytes of tensors, not {at}")
    return AdapterPart(manifest=manifest, blocks=blocks)


async def _receive(channel: Channel, patience: Patience) -> tuple[Message, memoryview]:
    reason = f"{short(channel.peer)} sends an adapter too slowly, or no more of it"
    return await patience.wait(channel.receive(), reason)


async def _send(channel: Channel, patience: Patience, message: Message) -> None:
    await patience.wait(channel.send(message), f"{short(channel.peer)} takes no answers")
