"""What a client learned about peers by itself: trust that decays, pairs that don't meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from shoal.base.ids import PeerId
from shoal.discovery.coordinates import Locator
from shoal.plan.view import Experience

FAILED_S: Final = 30.0
"""A peer that failed is avoided this long; each further failure doubles it."""

FAILED_S_MAX: Final = 600.0
"""Never longer than this: machines get repaired."""

REGAIN_ROWS: Final = 128
"""So many rows, a longer answer, and one failure is forgotten. A single row proves nothing: a
server that dies every few tokens gives some in between."""

REGAIN_S: Final = 600.0
"""So long without another failure, and one is forgotten too: as long as one is ever avoided."""

INCIDENT_S: Final = 5.0
"""Failures of a peer that follow each other so soon are one."""

PAIR_S: Final = 300.0
"""How long two servers count as unable to reach each other."""


LOAD_S: Final = 2.0
"""What a server said of its load counts this long."""

SLOW_S: Final = 120.0
"""How long a server is held for slow after it was last seen to be."""


class ExperienceBook:
    """Failures and measurements, with the loop time at which they stop to matter."""

    def __init__(
        self,
        own_sessions: Callable[[], Mapping[PeerId, int]] = dict,
        locator: Locator | None = None,
    ) -> None:
        """`own_sessions`: how many of our sessions run at which server now.

        `locator` finds our place from the round trips, to estimate those not measured.
        """
        self._own_sessions = own_sessions
        self._locator = locator
        self._avoid_until_s: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}
        self._failed_s: dict[PeerId, float] = {}
        """When each that is not trusted failed last, or when a failure was last forgotten."""
        self._rows: dict[PeerId, int] = {}
        """Rows that came over them since."""
        self._incident_s: dict[PeerId, float] = {}
        """When each failed last."""
        self._pairs_until_s: dict[tuple[PeerId, PeerId], float] = {}
        self._rtt_s: dict[PeerId, float] = {}
        self._slowness: dict[PeerId, tuple[float, float]] = {}
        self._rooms: dict[PeerId, tuple[float, float]] = {}
        """When there should be room, and until when that counts."""

    def failed(self, peer: PeerId, now_s: float) -> None:
        """The peer is broken or gone: avoid it, longer each time.

        What all its sessions report of one incident counts once.
        """
        if now_s - self._incident_s.get(peer, -math.inf) < INCIDENT_S:
            return
        self._forget_old(peer, now_s)
        self._incident_s[peer] = self._failed_s[peer] = now_s
        self._rows[peer] = 0
        count = self._failures[peer] = self._failures.get(peer, 0) + 1
        period_s = min(FAILED_S_MAX, FAILED_S * 2.0 ** (count - 1))
        self._avoid_until_s[peer] = now_s + period_s

    def busy(self, peer: PeerId, now_s: float, retry_after_s: float) -> None:
        """The peer is full: avoid it until then; this costs no trust."""
        until_s = max(self._avoid_until_s.get(peer, 0.0), now_s + retry_after_s)
        self._avoid_until_s[peer] = until_s

    def served(self, peer: PeerId, now_s: float, num_rows: int = 1) -> None:
        """The peer did its work: trust comes back with rows, and with time.

        After one failure it is avoided no longer, but the failure counts on for a while; after
        several the first must be forgotten before.
        """
        if peer not in self._failures:
            return
        self._forget_old(peer, now_s)
        self._rows[peer] = self._rows.get(peer, 0) + num_rows
        while self._rows[peer] >= REGAIN_ROWS and peer in self._failures:
            self._rows[peer] -= REGAIN_ROWS
            self._forget_one(peer, now_s)
        if self._failures.get(peer, 0) <= 1:
            self._avoid_until_s.pop(peer, None)

    def _forget_old(self, peer: PeerId, now_s: float) -> None:
        """Failures that are long over don't count any more."""
        while peer in self._failures and now_s - self._failed_s[peer] >= REGAIN_S:
            self._forget_one(peer, self._failed_s[peer] + REGAIN_S)

    def _forget_one(self, peer: PeerId, now_s: float) -> None:
        self._failures[peer] -= 1
        self._failed_s[peer] = now_s
        if not self._failures[peer]:
            del self._failures[peer], self._failed_s[peer]
            self._rows[peer] = 0

    def pair_failed(self, sender: PeerId, receiver: PeerId, now_s: float) -> None:
        """Both answer us, but not each other."""
        self._pairs_until_s[(sender, receiver)] = now_s + PAIR_S

    @property
    def has_failures(self) -> bool:
        """Whether anybody's failures are remembered."""
        return bool(self._failures)

    def round_trip(self, peer: PeerId, rtt_s: float) -> None:
        """A measured round trip; the lowest of recent ones counts."""
        old_s = self._rtt_s.get(peer, rtt_s)
        self._rtt_s[peer] = min(rtt_s, old_s + 0.1 * (rtt_s - old_s))
        if self._locator is not None:
            self._locator.measured(peer, self._rtt_s[peer])

    def slow(self, peer: PeerId, factor: float, now_s: float) -> None:
        """The peer's decode iterations take `factor` times as long as its record says."""
        self._slowness[peer] = (max(1.0, factor), now_s + SLOW_S)

    def load(self, peer: PeerId, room_in_s: float, now_s: float) -> None:
        """The peer said when a new session should find room there."""
        self._rooms[peer] = (now_s + room_in_s, now_s + LOAD_S)

    def knows_load(self, peer: PeerId, now_s: float) -> bool:
        """Whether the peer said so a short while ago."""
        return self._rooms.get(peer, (0.0, 0.0))[1] > now_s

    def has_room(self, peer: PeerId) -> None:
        """The peer calls us: it was full, and has room now."""
        self._rooms.pop(peer, None)
        if peer not in self._failures:
            self._avoid_until_s.pop(peer, None)

    def snapshot(self, now_s: float) -> Experience:
        """What holds now, frozen for a decision."""
        return Experience(
            rtt_s=dict(self._rtt_s),
            sessions=dict(self._own_sessions()),
            avoid=frozenset(peer for peer, until in self._avoid_until_s.items() if until > now_s),
            unreachable_pairs=frozenset(
                pair for pair, until in self._pairs_until_s.items() if until > now_s
            ),
            waits_s={
                peer: max(0.0, at_s - now_s)
                for peer, (at_s, until) in self._rooms.items()
                if until > now_s
            },
            slowness={
                peer: factor for peer, (factor, until) in self._slowness.items() if until > now_s
            },
            coordinate=None if self._locator is None else self._locator.coordinate,
        )
