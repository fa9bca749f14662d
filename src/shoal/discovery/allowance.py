"""An allowance: so many at once, and so many a second in the long run."""

from __future__ import annotations

from typing import Final

from shoal.base.ids import PeerId
from shoal.base.limits import RECORDS_MAX

UPDATES_BURST: Final = 8
"""Records of one peer that are taken at once: start, load, serve, refute, leave."""

UPDATES_PER_S: Final = 0.2
"""And in the long run: enough to refute a suspicion each SUSPECT_S, too little to flood."""

RECORDS_BURST: Final = RECORDS_MAX
"""New records that one source may hand over at once: a whole directory."""

RECORDS_PER_S: Final = 20.0
"""And in the long run: a swarm of 4,096 renews 9 a second. Checking 20 takes 2 ms."""


class Allowance:
    """A token bucket on a clock that is handed in.

    Args:
        burst: may be taken at once when nothing was taken for long.
        per_s: comes back each second.
    """

    __slots__ = ("_burst", "_left", "_per_s", "_seen_s")

    def __init__(self, burst: float, per_s: float, now_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = burst
        self._seen_s = now_s

    def take(self, now_s: float, count: float = 1.0) -> bool:
        """Take `count` if so many are left; otherwise take nothing."""
        self._refill(now_s)
        if self._left < count:
            return False
        self._left -= count
        return True

    def is_full(self, now_s: float) -> bool:
        """Whether nothing was taken lately: such an allowance may be forgotten."""
        self._refill(now_s)
        return self._left >= self._burst

    def _refill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._seen_s)
        self._left = min(self._burst, self._left + passed_s * self._per_s)
        self._seen_s = now_s


class UpdateLimits:
    """How often each peer's record may be replaced, whoever hands the new one over."""

    def __init__(self) -> None:
        self._updates: dict[PeerId, Allowance] = {}

    def take(self, peer: PeerId, now_s: float) -> bool:
        """Whether one more record of `peer` may be taken now."""
        allowance = self._updates.get(peer)
        if allowance is None:
            allowance = self._updates[peer] = Allowance(UPDATES_BURST, UPDATES_PER_S, now_s)
        return allowance.take(now_s)

    def forget(self, now_s: float) -> None:
        """Forget peers that replaced nothing lately; call it now and then."""
        for peer in [peer for peer, one in self._updates.items() if one.is_full(now_s)]:
            del self._updates[peer]
