"""Asking a ring's starter how the ring does."""

from __future__ import annotations

import asyncio

from shoal.base.errors import PeerTimeout, ProtocolError, error_from_code
from shoal.base.ids import short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.net.channel import Channel
from shoal.wire.messages import Error
from shoal.wire.ring import GetRing, RingState


async def ask_ring(channel: Channel, call: int = 1) -> RingState:
    """All nodes as the starter knows them; `channel` is a ring stream, which stays usable.

    Raises:
        PeerError, ProtocolError: it does not answer, or with something else.
    """
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await channel.send(GetRing(call))
            answer, _ = await channel.receive()
    except TimeoutError as error:
        raise PeerTimeout(f"{short(channel.peer)} does not say how the ring does") from error
    if isinstance(answer, Error):
        raise error_from_code(answer.code, answer.detail, answer.retry_after_s)
    if not isinstance(answer, RingState) or answer.call != call:
        raise ProtocolError(f"{type(answer).__name__} in answer to GetRing")
    return answer
