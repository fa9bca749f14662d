"""Serving weights: answers peers that need tensors, tokenizers or manifests.

What is handed out lies behind `Shelf`. One stream is worked off request by request, so that
at most one piece per stream is in memory; all streams share one rate, which is lower while
sessions are served: rows must not wait behind weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.errors import (
    ConfigError,
    ModelUnknown,
    PeerBusy,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import PIECE_BYTES_MAX
from shoal.net.channel import Channel, error_message
from shoal.server.pace import Pace
from shoal.wire.messages import Message
from shoal.wire.weights import GetHoldings, GetPiece, Holdings, Piece

logger = logging.getLogger(__name__)

RATE_BYTES_PER_S: Final = 32 << 20
"""Weights handed out, over all peers: a quarter of gigabit Ethernet is left to nobody else."""

RATE_BYTES_PER_S_MIN: Final = 64 << 10
"""A quarter of it, while sessions are served, still sends a piece in 16 s."""

TURN_S: Final = 10.0
"""Each of the streams gets a piece within this, at the lowest rate; peers wait twice as long."""

BUSY_SHARE: Final = 0.25
"""Part of the rate that is used while the engine has work."""

STREAMS_MAX: Final = 16
"""Streams at once: each holds one piece, and a peer fetches from several servers anyway."""

STREAMS_PER_PEER_MAX: Final = 2
"""One in use, and one that broke and is not noticed yet."""

BUSY_RETRY_S: Final = 5.0
"""When to come back to a server whose streams are all taken."""

IDLE_S: Final = 60.0
"""A stream without a request for this long is closed; whoever pauses dials again."""

SEND_TIMEOUT_S: Final = 60.0
"""A peer that takes no piece for this long is gone, or keeps us for fun."""


class Shelf(Protocol):
    """The weights that a peer can hand out."""

    async def holdings(self, model: bytes) -> Holdings | None:
        """What is held of a model (16 bytes), call 0; None: nothing is known of it."""

    async def read(self, content: bytes, offset: int, count: int) -> bytes | None:
        """Bytes of what has this hash; None: not held, or shorter.

        Raises:
            ModelCorrupt: it was held, and its file is broken now.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """How much of this machine's network others may take for weights."""

    rate_bytes_per_s: int = RATE_BYTES_PER_S
    busy_share: float = BUSY_SHARE
    streams_max: int = STREAMS_MAX

    def __post_init__(self) -> None:
        if self.rate_bytes_per_s < RATE_BYTES_PER_S_MIN:
            raise ConfigError(
                f"a rate of {self.rate_bytes_per_s} bytes per second for weights: at least "
                f"{RATE_BYTES_PER_S_MIN}, or peers take a slow piece for a dead server"
            )
        if not 0 < self.busy_share <= 1:
            raise ConfigError(f"busy_share {self.busy_share}: above 0, at most 1")


class WeightServer:
    """Hands out what a shelf holds to the peers of our swarm."""

    def __init__(
        self,
        shelf: Shelf,
        config: WeightsConfig | None = None,
        *,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._shelf = shelf
        self._config = config or WeightsConfig()
        self._is_busy = is_busy
        self._pace = Pace(self._rate)
        slowest = self._config.rate_bytes_per_s * self._config.busy_share
        turns = int(slowest * TURN_S / PIECE_BYTES_MAX)
        self._streams_max = max(1, min(self._config.streams_max, turns))
        self._streams: Counter[PeerId] = Counter()
        self.sent_bytes = 0
        """Bytes of pieces that were handed out."""

    def yield_to(self, is_busy: Callable[[], bool]) -> None:
        """Slow down while `is_busy()`: set once there is an engine."""
        self._is_busy = is_busy

    def _rate(self) -> float:
        share = self._config.busy_share if self._is_busy() else 1.0
        return self._config.rate_bytes_per_s * share

    async def serve(self, channel: Channel) -> None:
        """Answer on one stream until it ends.

        Raises:
            PeerUnreachable, PeerTimeout: it ended, or the peer does nothing with it.
            ProtocolError: nonsense came.
        """
        peer = channel.peer
        if (
            self._streams.total() >= self._streams_max
            or self._streams[peer] >= STREAMS_PER_PEER_MAX
        ):
            busy = PeerBusy("hands out weights to enough peers now", retry_after_s=BUSY_RETRY_S)
            await turn_away(channel, busy)
            return
        self._streams[peer] += 1
        try:
            await self._answer_all(channel)
        except ProtocolError as error:
            await channel.refuse(error)
            raise
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            channel.close()

    async def _answer_all(self, channel: Channel) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    message, _ = await channel.receive()
            except TimeoutError as error:
                raise PeerTimeout(f"{short(channel.peer)} asks for nothing more") from error
            answer, payload = await self._answer(channel.peer, message)
            await self._pace.take(len(payload))
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await channel.send(answer, *([payload] if payload else []))
            except TimeoutError as error:
                raise PeerTimeout(f"{short(channel.peer)} takes no weights") from error
            self.sent_bytes += len(payload)

    async def _answer(self, peer: PeerId, message: Message) -> tuple[Message, bytes]:
        if not isinstance(message, GetHoldings | GetPiece):
            raise ProtocolError(f"{type(message).__name__} on a weights stream")
        try:
            if isinstance(message, GetPiece):
                return Piece(message.call), await self._piece(message)
            return await self._holdings(message), b""
        except ShoalError as error:
            logger.warning("weights not served peer=%s reason=%s", short(peer), error)
            return error_message(error, message.call), b""

    async def _holdings(self, message: GetHoldings) -> Holdings:
        found = await self._shelf.holdings(message.model)
        if found is None:
            raise ModelUnknown(f"nothing of model {message.model.hex()} here")
        return Holdings(message.call, found.manifest_bytes, found.held, found.files)

    async def _piece(self, message: GetPiece) -> bytes:
        found = await self._shelf.read(message.content, message.offset, message.count)
        if found is None or len(found) != message.count:
            raise ModelUnknown(
                f"{message.count} bytes from {message.offset} of {message.content.hex()} "
                "are not here"
            )
        return found


async def turn_away(channel: Channel, reason: ShoalError) -> None:
    """Answer the first request with `reason`, and let the peer end the stream.

    If we ended it, the request under way would break the connection before the reason is read.
    """
    try:
        async with asyncio.timeout(BUSY_RETRY_S):
            await channel.receive()
            await channel.send(error_message(reason))
            await channel.receive()
    except (TimeoutError, PeerUnreachable, ProtocolError):
        logger.debug("peer turned away peer=%s reason=%s", short(channel.peer), reason)
    finally:
        channel.close()


async def hand_out_nothing(channel: Channel) -> None:
    """Serves weights streams where no weights are handed out."""
    await turn_away(channel, PeerRefused("hands out no weights"))
