"""What a server looks after from time to time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shoal.base.ids import short
from shoal.server.intake import REOPEN_PERIOD_S, Intake
from shoal.server.session import HopSession
from shoal.server.sessions import SessionTable

logger = logging.getLogger(__name__)


async def close_idle(
    sessions: SessionTable, idle_s: float, forget: Callable[[HopSession], None]
) -> None:
    """Forget sessions that nothing was heard of for `idle_s`, until cancelled."""
    while True:
        await asyncio.sleep(max(1.0, idle_s / 10))
        limit_s = asyncio.get_running_loop().time() - idle_s
        for hop in list(sessions):
            if hop.used_s < limit_s:
                logger.info("idle session closed session=%s", short(hop.plan.session))
                forget(hop)


async def reopen(intake: Intake, on_held_changed: Callable[[HopSession], None]) -> None:
    """Ask again for rows that were dropped for want of room, until cancelled."""
    while True:
        await intake.overran.wait()
        await asyncio.sleep(REOPEN_PERIOD_S)
        for hop in intake.reopened():
            on_held_changed(hop)
