"""What one peer may take of a server, and who is next when it is full.

Engine time is shared in `fairness.py`, the cache in `sessions.py`; here are the bounds on
what a peer can pile up: sessions, streams, bytes per second, bytes in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, SessionId

SESSIONS_MAX: Final = 4096
"""Hops at one server: bounds what parked ones cost, which hold no cache."""

SESSIONS_PER_CLIENT: Final = 1024
"""Hops of one client at one server: a quarter, so that no client can fill it alone."""

CACHE_SHARE: Final = 0.5
"""Part of the KV cache beyond which a client's sessions give way to others, whatever their
age: half of it, so that one client that lies about ages can't keep all others out."""

STREAMS_PER_PEER: Final = 32
"""Open streams of one peer: a client needs one for control and two for rows, a server as
many again, and streams that broke are noticed late."""

BYTES_PER_S_PER_PEER: Final = 125_000_000
"""Rows taken in from one peer per second: gigabit Ethernet. Whoever sends faster waits."""

QUEUE_BYTES_PER_CLIENT: Final = 256 << 20
"""Rows of one client that wait here: 256 MiB, four frames of the largest size. Beyond it
rows are dropped and asked for again later."""

LOG_BYTES_MAX: Final = 4 << 30
"""Logs of all sessions in host memory: 4 GiB, 260,000 tokens of an 8,192-wide bf16 model.
Beyond it the clients with most lose the acknowledged part; repair then starts earlier."""

RETRY_AFTER_S: Final = 2.0
"""The soonest to come back to a full server: the length of a short answer."""

RETRY_AFTER_MAX_S: Final = 30.0
"""The latest: by then whoever is idle has given way."""

PLACE_GRACE_S: Final = 10.0
"""A place in the line is kept this long beyond the time at which to come back."""

LINE_MAX: Final = 4096
"""Places in the line; as many as there may be sessions."""

HISTORY_S: Final = 60.0
"""How far back departures tell what to expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Bounds on what one peer may take. Bytes, bytes per second, counts."""

    sessions_per_client: int = SESSIONS_PER_CLIENT
    streams_per_peer: int = STREAMS_PER_PEER
    bytes_per_s_per_peer: int = BYTES_PER_S_PER_PEER
    queue_bytes_per_client: int = QUEUE_BYTES_PER_CLIENT
    log_bytes_max: int = LOG_BYTES_MAX
    cache_share: float = CACHE_SHARE

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "cache_share" and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.cache_share <= 1:
            raise ConfigError(f"cache_share is {self.cache_share}: above 0, at most 1")


class Line:
    """Sessions that found a server full, first come first served. Pure.

    Whoever is told to wait keeps a place until shortly after the time it was told; a
    newcomer gets nothing that somebody in front of it waits for.
    """

    def __init__(self) -> None:
        self._places: dict[SessionId, float] = {}
        """When each place lapses, first in line first."""
        self._departures: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._places)

    def ahead_of(self, session: SessionId, now_s: float) -> int:
        """How many wait in front of `session`, which may be new."""
        self._expire(now_s)
        for index, other in enumerate(self._places):
            if other == session:
                return index
        return len(self._places)

    def wait(self, session: SessionId, now_s: float) -> tuple[int, float]:
        """Take or keep a place; returns it (1: next) and in how many seconds to come back."""
        ahead = self.ahead_of(session, now_s)
        eta_s = self._eta_s(ahead + 1, now_s)
        if session in self._places or len(self._places) < LINE_MAX:
            self._places[session] = now_s + eta_s + PLACE_GRACE_S
        return ahead + 1, eta_s

    def leave(self, session: SessionId) -> None:
        """It got in, or wants nothing any more."""
        self._places.pop(session, None)

    def departed(self, now_s: float) -> None:
        """A session ended and freed what it held."""
        self._departures.append(now_s)

    def _eta_s(self, place: int, now_s: float) -> float:
        while self._departures and self._departures[0] < now_s - HISTORY_S:
            self._departures.popleft()
        if not self._departures:
            return RETRY_AFTER_MAX_S if place > 1 else RETRY_AFTER_S
        each_s = HISTORY_S / len(self._departures)
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_S, place * each_s))

    def _expire(self, now_s: float) -> None:
        lapsed = [session for session, until_s in self._places.items() if until_s < now_s]
        for session in lapsed:
            del self._places[session]


def owners_over(held: Mapping[PeerId, int], limit: int) -> list[PeerId]:
    """Who must give up some so that all together hold at most `limit`: the largest first.

    Cutting each of them down to the next one's size, or to an equal part, would do.
    """
    over: list[PeerId] = []
    total = sum(held.values())
    part = limit // max(1, len(held))
    for owner in sorted(held, key=lambda owner: held[owner], reverse=True):
        if total <= limit or held[owner] <= part:
            break
        over.append(owner)
        total -= held[owner] - part
    return over
