"""One weights stream to one peer: asks for pieces ahead, and gets them in order."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import (
    ModelUnknown,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    ProtocolError,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import PIECE_BYTES_MAX
from shoal.net.channel import Channel
from shoal.wire.messages import Error, Message
from shoal.wire.weights import GetHoldings, GetPiece, Holdings, Piece

AHEAD: Final = 16
"""Pieces asked for and not here yet: 4 MiB, 40 MB/s at a round trip of 100 ms."""

STALL_S: Final = 20.0
"""A peer that owes an answer for this long is left: 13 kB/s, slower than it is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A part of something that is named by its hash."""

    content: bytes
    offset: int
    count: int


def wishes(content: bytes, start: int, end: int) -> list[Wish]:
    """The bytes [start, end) of `content`, in pieces."""
    return [
        Wish(content=content, offset=offset, count=min(PIECE_BYTES_MAX, end - offset))
        for offset in range(start, end, PIECE_BYTES_MAX)
    ]


class WeightStream:
    """Asks one peer. One caller at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._calls = itertools.count(1)

    @property
    def peer(self) -> PeerId:
        """Whom it asks."""
        return self._channel.peer

    def close(self) -> None:
        """End the stream at once."""
        self._channel.close()

    async def holdings(self, model: bytes) -> Holdings:
        """What the peer has of a model.

        Raises:
            ModelUnknown: nothing.
            PeerError, ProtocolError: it can't or won't say.
        """
        call = next(self._calls)
        await self._send(GetHoldings(call, model))
        answer, payload = await self._receive()
        if not isinstance(answer, Holdings) or answer.call != call or payload.nbytes:
            raise PeerMisbehaved(f"{short(self.peer)} does not say what weights it has")
        return answer

    async def pieces(self, wanted: Iterable[Wish]) -> AsyncGenerator[tuple[Wish, memoryview], None]:
        """The pieces, each with its bytes, in the order in which they are wanted.

        Raises:
            ModelUnknown: the peer has not got one of them (any more).
            PeerError, ProtocolError: it can't or won't send.
        """
        waiting = deque(wanted)
        asked: deque[tuple[int, Wish]] = deque()
        while waiting or asked:
            while waiting and len(asked) < AHEAD:
                call, wish = next(self._calls), waiting.popleft()
                await self._send(GetPiece(call, wish.content, wish.offset, wish.count))
                asked.append((call, wish))
            answer, payload = await self._receive()
            call, wish = asked.popleft()
            if not isinstance(answer, Piece) or (answer.call, payload.nbytes) != (call, wish.count):
                raise PeerMisbehaved(f"{short(self.peer)} answers with other bytes than asked for")
            yield wish, payload

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await self._channel.send(message)
        except TimeoutError as error:
            raise PeerTimeout(f"{short(self.peer)} takes no requests") from error

    async def _receive(self) -> tuple[Message, memoryview]:
        try:
            async with asyncio.timeout(STALL_S):
                answer, payload = await self._channel.receive()
        except TimeoutError as error:
            raise PeerTimeout(f"{short(self.peer)} sent nothing for {STALL_S:g} s") from error
        if isinstance(answer, Error):
            raise _as_ours(self.peer, answer)
        return answer, payload


def _as_ours(peer: PeerId, answer: Error) -> ShoalError:
    """A peer's error as one about that peer: what it calls its own fault is not ours."""
    detail = f"{short(peer)}: {answer.detail}"
    error = error_from_code(answer.code, detail, answer.retry_after_s)
    if isinstance(error, PeerError | ProtocolError | ModelUnknown):
        return error
    return PeerError(f"{detail} ({answer.code})")
