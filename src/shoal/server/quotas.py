"""What one peer may take of a server, and who is next when it is full.

Engine time is shared in `fairness.py`, the cache in `sessions.py`; here are the bounds on
what a peer can pile up: sessions, streams, bytes per second, bytes in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, SessionId
from shoal.net.origin import Origin
from shoal.server.shares import ADDRESS_SHARE, check_share, taken_by

SESSIONS_MAX: Final = 4096
"""Hops at one server: bounds what parked ones cost, which hold no cache."""

SESSIONS_PER_CLIENT: Final = 1024
"""Hops of one client at one server: a quarter, so that no client can fill it alone."""

CACHE_SHARE: Final = 0.75
"""Part of the KV cache that one client may hold. Opening times are only what a client says,
so whoever lies about them could keep all others out; a quarter is left to them."""

STREAMS_PER_PEER: Final = 32
"""Open streams of one peer: a client needs one for control and two for rows, a server as
many again, and streams that broke are noticed late."""

STREAMS_PER_ADDRESS: Final = 256
"""Open streams of all peers of one address: eight peers' worth, and a quarter of the files that
a process may usually have open."""

BYTES_PER_S_PER_CLIENT: Final = 125_000_000
"""Rows of one client that are run per second: gigabit Ethernet. Beyond it they wait."""

QUEUE_BYTES_PER_CLIENT: Final = 256 << 20
"""Rows of one client that wait here: 256 MiB, four frames of the largest size. Beyond it
rows are dropped and asked for again later."""

QUEUES_PER_ADDRESS: Final = 4
"""Clients of one address may have so many clients' rows waiting here, together."""

LOG_BYTES_MAX: Final = 4 << 30
"""Logs of all sessions in host memory: 4 GiB, 260,000 tokens of an 8,192-wide bf16 model.
Beyond it the clients with most lose the acknowledged part; repair then starts earlier."""

RETRY_AFTER_S: Final = 2.0
"""The soonest to come back to a full server: the length of a short answer."""

RETRY_AFTER_MAX_S: Final = 30.0
"""The latest: by then whoever is idle has given way."""

PLACE_GRACE_S: Final = 10.0
"""A place in the line is kept this long beyond the time at which to come back."""

CLOCK_STEP_S: Final = 1e-6
"""Waits below this are none: a timer may fire that much early."""

BURST_S: Final = 1.0
"""An owner may be this far ahead of its rate: a prompt comes in one go."""

LINE_MAX: Final = 4096
"""Places in the line; as many as there may be sessions."""

PLACES_PER_CLIENT: Final = 16
"""Places of one client in the line: a batch of sessions, and no client can fill it."""

PLACES_PER_ADDRESS: Final = 64
"""Places of all clients of one address: those of four clients."""

DEPARTURES_MAX: Final = 1024
"""Departures that are remembered: 17 a second, for a minute."""

HISTORY_S: Final = 60.0
"""How far back departures tell what to expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Bounds on what one peer may take. Bytes, bytes per second, counts."""

    sessions_per_client: int = SESSIONS_PER_CLIENT
    streams_per_peer: int = STREAMS_PER_PEER
    bytes_per_s_per_client: int = BYTES_PER_S_PER_CLIENT
    queue_bytes_per_client: int = QUEUE_BYTES_PER_CLIENT
    log_bytes_max: int = LOG_BYTES_MAX
    cache_share: float = CACHE_SHARE
    address_share: float = ADDRESS_SHARE
    """Of cache and sessions, for all clients of one address."""
    streams_per_address: int = STREAMS_PER_ADDRESS
    queues_per_address: int = QUEUES_PER_ADDRESS

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not name.endswith("_share") and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.cache_share <= 1:
            raise ConfigError(f"cache_share is {self.cache_share}: above 0, at most 1")
        check_share(self.address_share)


class Line:
    """Sessions that found a server full, first come first served. Pure.

    Whoever is told to wait keeps a place until shortly after the time it was told; a
    newcomer gets nothing that somebody in front of it waits for.
    """

    def __init__(self) -> None:
        self._places: dict[SessionId, _Place] = {}
        """First in line first."""
        self._departures: deque[float] = deque(maxlen=DEPARTURES_MAX)

    def __len__(self) -> int:
        return len(self._places)

    def ahead_of(self, session: SessionId, now_s: float) -> int:
        """How many wait in front of `session`, which may be new."""
        self._expire(now_s)
        for index, other in enumerate(self._places):
            if other == session:
                return index
        return len(self._places)

    def wait(
        self, session: SessionId, owner: PeerId, now_s: float, origin: Origin | None = None
    ) -> tuple[int, float]:
        """Take or keep a place; returns it (1: next) and in how many seconds to come back.

        An owner with many places already gets no more of them, and comes last; so does one
        whose address (`origin`) has many.
        """
        ahead = self.ahead_of(session, now_s)
        eta_s = self._eta_s(ahead + 1, now_s)
        if session in self._places or self._has_room(owner, origin):
            self._places[session] = _Place(owner, now_s + eta_s + PLACE_GRACE_S, origin)
        return ahead + 1, eta_s

    def room_in_s(self, now_s: float) -> float:
        """In how many seconds a newcomer should find room."""
        self._expire(now_s)
        return self._eta_s(len(self._places) + 1, now_s)

    def call(self, count: int, now_s: float) -> list[tuple[PeerId, SessionId]]:
        """The first `count` in line may come; returns who was not called before."""
        self._expire(now_s)
        called: list[tuple[PeerId, SessionId]] = []
        for session in list(self._places)[:count]:
            place = self._places[session]
            if not place.is_called:
                self._places[session] = place._replace(
                    until_s=now_s + PLACE_GRACE_S, is_called=True
                )
                called.append((place.owner, session))
        return called

    def leave(self, session: SessionId, owner: PeerId) -> None:
        """It got in, or wants nothing any more."""
        place = self._places.get(session)
        if place is not None and place.owner == owner:
            del self._places[session]

    def keep_only(self, owner: PeerId, sessions: Collection[bytes]) -> None:
        """The owner knows of these sessions and no others."""
        gone = [
            session
            for session, place in self._places.items()
            if place.owner == owner and session not in sessions
        ]
        for session in gone:
            del self._places[session]

    def departed(self, now_s: float) -> None:
        """A session ended and freed what it held."""
        self._departures.append(now_s)

    def _has_room(self, owner: PeerId, origin: Origin | None) -> bool:
        mine = sum(1 for place in self._places.values() if place.owner == owner)
        near = taken_by(origin, ((place.origin, 1) for place in self._places.values()))
        is_bounded = mine < PLACES_PER_CLIENT and near < PLACES_PER_ADDRESS
        return is_bounded and len(self._places) < LINE_MAX

    def _eta_s(self, place: int, now_s: float) -> float:
        while self._departures and self._departures[0] < now_s - HISTORY_S:
            self._departures.popleft()
        if not self._departures:
            return RETRY_AFTER_MAX_S if place > 1 else RETRY_AFTER_S
        each_s = HISTORY_S / len(self._departures)
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_S, place * each_s))

    def _expire(self, now_s: float) -> None:
        lapsed = [session for session, place in self._places.items() if place.until_s < now_s]
        for session in lapsed:
            del self._places[session]


class _Place(NamedTuple):
    owner: PeerId
    until_s: float
    """When it lapses."""
    origin: Origin | None = None
    """Where its owner connects from."""
    is_called: bool = False
    """Whether its owner was told to come."""


class Rates:
    """Holds each owner to a number of bytes per second, over all its sessions. Pure."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_s: dict[PeerId, float] = {}
        """Until when what the owner took is paid for."""

    def took(self, owner: PeerId, num_bytes: int, now_s: float) -> None:
        """Rows of the owner ran."""
        start_s = max(now_s, self._paid_s.get(owner, now_s))
        self._paid_s[owner] = start_s + num_bytes / self._bytes_per_s

    def wait_s(self, owner: PeerId, now_s: float) -> float:
        """How long its rows must wait; 0: they may run."""
        wait_s = self._paid_s.get(owner, now_s) - now_s - BURST_S
        return wait_s if wait_s > CLOCK_STEP_S else 0.0

    def forget_paid(self, now_s: float) -> None:
        """Drop owners that owe nothing."""
        self._paid_s = {owner: at_s for owner, at_s in self._paid_s.items() if at_s > now_s}


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
