"""Where the rows of one client's many sessions leave: in even groups, chain by chain.

For whoever has all the sessions in one process, such as a gateway: `plan.waves` decides.
"""

from __future__ import annotations

import asyncio
from typing import Final

from shoal.base.ids import PeerId, SessionId
from shoal.client.chain_session import ChainSession
from shoal.client.turnstile import Turnstile
from shoal.plan.slots import Slots
from shoal.plan.waves import expected_trip_s, makes_waves, wave_slots

LATE_S: Final = 0.05
"""A session whose row is back and that wants no other by then is not waited for: its reader is
slow. Head and choice of a whole group take less."""

TRIP_CHANGED: Final = 0.1
"""A trip that differs by more than this changes when rows leave."""


class _Round:
    """A chain, and those of our sessions that decode over it."""

    def __init__(self, hops: int) -> None:
        self.turnstile = Turnstile(self._slots)
        self.sessions: set[int] = set()
        self._hops = hops
        self._trip_s = self._used_s = 0.0

    @property
    def makes_waves(self) -> bool:
        """Whether rows wait for their turn."""
        return makes_waves(len(self.sessions), self._hops)

    def took(self, trip_s: float) -> None:
        """A row came back after so long."""
        self._trip_s = expected_trip_s(self._trip_s, trip_s)
        if abs(self._trip_s - self._used_s) > TRIP_CHANGED * self._used_s:
            self.turnstile.choose_again()

    def _slots(self, sessions: int) -> Slots:
        self._used_s = self._trip_s
        return wave_slots(sessions, self._hops, self._trip_s)


class Waves:
    """Lets rows pass. One event loop; a session has at most one row under way here."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[PeerId, ...], _Round] = {}
        self._places: dict[SessionId, tuple[tuple[PeerId, ...], int]] = {}
        """The chain that each session that decodes goes round, and its number there."""
        self._left_s: dict[SessionId, float] = {}
        self._late: dict[SessionId, asyncio.TimerHandle] = {}
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time

    @property
    def num_sessions(self) -> int:
        """Sessions that decode."""
        return len(self._places)

    def may_leave(self, session: ChainSession) -> bool:
        """Whether the session's next row may leave at once; else wait for its `turn`."""
        round_, number = self._place(session)
        if round_.makes_waves:
            return False
        round_.turnstile.leave(number)  # it counts as under way there
        self._left_s[session.id] = self._clock()
        return True

    async def turn(self, session: ChainSession) -> None:
        """Wait until the session's next row may leave; tell `came` when it is back."""
        round_, number = self._place(session)
        self._in_time(session.id)
        await round_.turnstile.enter(number)
        self._left_s[session.id] = self._clock()

    def _place(self, session: ChainSession) -> tuple[_Round, int]:
        chain = tuple(stage.peer for stage in session.chain)
        place = self._places.get(session.id)
        if place is None or place[0] != chain:  # it was repaired, or moved
            self.leave(session.id)
            self._next += 1
            place = self._places[session.id] = (chain, self._next)
            if chain not in self._rounds:
                self._rounds[chain] = _Round(len(chain))
            self._rounds[chain].sessions.add(place[1])
        return self._rounds[chain], place[1]

    def came(self, session: SessionId) -> None:
        """The row that left is back."""
        left_s, place = self._left_s.pop(session, None), self._places.get(session)
        if left_s is None or place is None:
            return
        self._rounds[place[0]].took(self._clock() - left_s)
        turnstile = self._rounds[place[0]].turnstile
        self._in_time(session)
        self._late[session] = self._loop.call_later(LATE_S, turnstile.leave, place[1])

    def _in_time(self, session: SessionId) -> None:
        timer = self._late.pop(session, None)
        if timer is not None:
            timer.cancel()

    def leave(self, session: SessionId) -> None:
        """The session has no more rows for now. Idempotent."""
        self._left_s.pop(session, None)
        self._in_time(session)
        place = self._places.pop(session, None)
        if place is None:
            return
        chain, number = place
        round_ = self._rounds[chain]
        round_.sessions.discard(number)
        round_.turnstile.leave(number)
        if not round_.sessions:
            round_.turnstile.close()
            del self._rounds[chain]
