"""What one client's load may cost the others: how engine time is shared between owners.

Nothing here binds a client that is alone. As soon as another one decodes, a client gets a
few decode rows per iteration, which cost the others little, and prefill chunks (replays
too) take at most a share of the time: after a chunk that took d seconds, d seconds belong
to decode rows. So whoever decodes keeps at least half of its speed, whatever others send.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId

ACTIVE_S: Final = 1.0
"""Who decoded a row this recently will send the next one soon: longer than a token takes on
most chains, so that a client isn't forgotten while its token is elsewhere."""

ROWS_PER_CLIENT: Final = 16
"""Decode rows of one client per iteration while others decode too. Measured (1.1B shape,
bfloat16, one core): 16 rows take 1.3 times as long as one, 32 take 1.5 times."""

CHUNK_SHARE: Final = 0.5
"""Share of the time that chunks may take while another client decodes: with half of it, a
decoding client's mean time per token at most doubles."""

CLOCK_STEP_S: Final = 1e-6
"""Waits below this are none: a timer may fire that much early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FairLimits:
    """How much of the engine one client may take while others want it."""

    rows_per_client: int = ROWS_PER_CLIENT
    chunk_share: float = CHUNK_SHARE

    def __post_init__(self) -> None:
        if self.rows_per_client < 1:
            raise ConfigError("a client needs at least 1 row per iteration")
        if not 0 < self.chunk_share <= 1:
            raise ConfigError(f"a chunk share of {self.chunk_share} is not in (0, 1]")


class Fairness:
    """Who decoded lately, and when chunks ran. Clocks are handed in."""

    def __init__(self, limits: FairLimits) -> None:
        self._limits = limits
        self._decoded_s: dict[PeerId, float] = {}
        """When each owner last had a decode row; only the last `ACTIVE_S`."""
        self._chunks_s: dict[PeerId, float] = {}
        """When each owner's chunks last ran."""
        self._free_s = 0.0
        """From when on chunks may run again while others decode."""

    def decodes(self, owner: PeerId, now_s: float) -> None:
        """The owner has a decode row."""
        self._decoded_s.pop(owner, None)
        self._decoded_s[owner] = now_s

    def ran_chunks(self, owners: Collection[PeerId], started_s: float, ended_s: float) -> None:
        """An iteration ran chunks of these owners."""
        for owner in owners:
            self._chunks_s[owner] = ended_s
        share = self._limits.chunk_share
        self._free_s = ended_s + (ended_s - started_s) * (1 - share) / share

    def forget_owners(self, known: Collection[PeerId]) -> None:
        """Keep no more than the owners that still have sessions."""
        self._chunks_s = {
            owner: at_s for owner, at_s in self._chunks_s.items() if owner in known
        }  # fmt: skip

    def rows_per_client(self, owners: Collection[PeerId], now_s: float) -> int | None:
        """Decode rows that each of these waiting owners may run now; None: all."""
        self._expire(now_s)
        active = self._decoded_s.keys() | set(owners)
        return self._limits.rows_per_client if len(active) > 1 else None

    def chunk_wait_s(self, owner: PeerId, now_s: float) -> float:
        """How long the owner's chunks must wait yet; 0: they may run."""
        self._expire(now_s)
        if all(other == owner for other in self._decoded_s):
            return 0.0
        wait_s = self._free_s - now_s
        return wait_s if wait_s > CLOCK_STEP_S else 0.0

    def last_chunk_s(self, owner: PeerId) -> float:
        """When the owner's chunks last ran; who waited longest goes first."""
        return self._chunks_s.get(owner, 0.0)

    def _expire(self, now_s: float) -> None:
        while self._decoded_s:
            owner, at_s = next(iter(self._decoded_s.items()))
            if at_s > now_s - ACTIVE_S:
                return
            del self._decoded_s[owner]
