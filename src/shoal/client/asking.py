"""Questions to a server that are answered at once."""

from __future__ import annotations

import asyncio

from shoal.base.errors import PeerMisbehaved, ShoalError
from shoal.base.ids import SessionId
from shoal.base.limits import ALIVE_MISSED_MAX, ALIVE_PERIOD_S
from shoal.client.experience import ExperienceBook
from shoal.client.server_link import ServerLink
from shoal.wire.directory import GetLoad, Load
from shoal.wire.messages import GetHeld, Ping, Routed


async def answers(link: ServerLink) -> bool:
    """Whether the server answers now, dialling it if need be."""
    try:
        await link.connect(rows=False)
        async with asyncio.timeout(ALIVE_MISSED_MAX * ALIVE_PERIOD_S):
            await link.request(Ping)
    except (ShoalError, TimeoutError):
        return False
    return True


async def held(link: ServerLink, session: SessionId) -> Routed:
    """How far a session has come there.

    Raises:
        ShoalError: it does not answer, or with nonsense.
    """
    await link.connect(rows=False)
    answer = await link.request(lambda call: GetHeld(call, session))
    if not isinstance(answer, Routed):
        raise PeerMisbehaved(f"{type(answer).__name__} is no answer to GetHeld")
    return answer


async def decode_s_per_block(link: ServerLink, experience: ExperienceBook) -> float:
    """What its decode iterations take now, per block; 0: it has done none.

    Raises:
        ShoalError: it does not answer, or with nonsense.
    """
    await link.connect(rows=False)
    now = asyncio.get_running_loop().time
    asked_s = now()
    answer = await link.request(GetLoad)
    if not isinstance(answer, Load):
        raise PeerMisbehaved(f"{type(answer).__name__} is no answer to GetLoad")
    experience.round_trip(link.peer, now() - asked_s)
    experience.load(link.peer, answer.room_in_s, now())
    return answer.decode_s_per_block
