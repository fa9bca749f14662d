"""An allowance: so many at once, and so many a second in the long run."""

from __future__ import annotations


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
