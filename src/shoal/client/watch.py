"""The watch over servers that owe us rows: who is silent, who is stuck, who delivers nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from shoal.base.ids import PeerId, SessionId, short
from shoal.base.limits import ALIVE_MISSED_MAX, ALIVE_PERIOD_S, STALL_FACTOR, STALL_MIN_S
from shoal.client.server_link import ServerLink
from shoal.client.session import SessionState, Trouble
from shoal.wire.messages import Alive

logger = logging.getLogger(__name__)

RESYNC_S_MAX: Final = 16.0
"""A session that stands still asks everybody what they have at least this often."""

STANDSTILLS_MAX: Final = 2
"""Standstills without a row before a hop is suspected: 2 + 4 + 8 s of asking in vain."""

FIRST_ITERATION_S_MAX: Final = 60.0
"""A server that has no experience yet may take this long: first calls on slow processors."""


class Watch:
    """Pings the servers of all sessions that wait."""

    def __init__(
        self,
        sessions: Mapping[SessionId, SessionState],
        link: Callable[[PeerId], ServerLink],
        drop: Callable[[ServerLink], None],
        report: Callable[[SessionState, Trouble], None],
    ) -> None:
        self._sessions = sessions
        self._link = link
        self._drop = drop
        self._report = report

    async def run(self) -> None:
        """Ping servers that owe us rows; report the silent, the stuck and the standstill."""
        while True:
            await asyncio.sleep(ALIVE_PERIOD_S)
            now_s = asyncio.get_running_loop().time()
            owed = [state for state in self._sessions.values() if state.is_waiting]
            waiting = [state for state in owed if not state.is_mending]
            chained = {peer for state in waiting for peer in state.servers}
            for peer in sorted({peer for state in owed for peer in state.peers}):
                link = self._link(peer)
                if not link.is_up and peer not in chained:
                    continue  # a standby, or one that a repair is asking just now
                if not link.is_up or _is_silent(link, now_s) or _is_stuck(link.alive):
                    self._drop(link)
                else:
                    link.ping(now_s)
            for state in waiting:
                quiet_s = now_s - max(state.progressed_s, state.asked_s)
                if quiet_s > state.resync_after_s and not state.trouble:
                    self._stands_still(state, now_s)

    def _stands_still(self, state: SessionState, now_s: float) -> None:
        """Everybody answers and no row comes: open all links anew; later, name a suspect."""
        self._link(state.inbound.predecessor).redial_rows(state.resync_after_s)
        state.standstills += 1
        state.resync_after_s = min(RESYNC_S_MAX, 2 * state.resync_after_s)
        state.asked_s = now_s
        trouble = Trouble(is_out_of_step=True)
        suspect = state.suspect() if state.standstills > STANDSTILLS_MAX else None
        if suspect is not None and not self._is_computing(state, suspect):
            logger.warning("peer delivers nothing peer=%s session=%s",
                           short(suspect), short(state.id))  # fmt: skip
            trouble.bad.add(suspect)
        self._report(state, trouble)

    def _is_computing(self, state: SessionState, peer: PeerId) -> bool:
        """Whether an iteration runs at the peer, or one ended since we last asked this."""
        alive = self._link(peer).alive
        if alive is None:
            return False
        before = state.iterations.get(peer)
        state.iterations[peer] = alive.iteration
        return alive.iteration_s > 0 or alive.iteration != before


def _is_silent(link: ServerLink, now_s: float) -> bool:
    return link.pinged_s is not None and now_s - link.pinged_s >= ALIVE_MISSED_MAX * ALIVE_PERIOD_S


def _is_stuck(alive: Alive | None) -> bool:
    """The running iteration lasts far longer than the server itself expected."""
    if alive is None:
        return False
    if not alive.iteration_estimate_s:
        return alive.iteration_s > FIRST_ITERATION_S_MAX
    limit_s = max(STALL_MIN_S, STALL_FACTOR * alive.iteration_estimate_s)
    return alive.iteration_s > limit_s
