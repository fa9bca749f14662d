"""Sessions of finished answers, so that a conversation's next turn sends only what is new.

A session is found again by its caller and its tokens. It is taken if the new prompt
continues it, forked if the prompt shares a part only, such as a long system message.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.errors import ShoalError
from shoal.base.ids import SessionId

SHARED_MIN: Final = 16
"""Fewer tokens in common are computed sooner than a session is found and cut."""

FORK_MIN: Final = 64
"""Fewer tokens are computed sooner than a fork has its route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptConfig:
    """How much is kept."""

    tokens_max: int
    """Over all sessions: they take the servers' cache."""
    sessions_max: int = 64
    ttl_s: float = 600.0
    """People who think longer have left."""


class KeptSession(Protocol):
    """What is needed of a session: see `shoal.client.chain_session.ChainSession`."""

    @property
    def id(self) -> SessionId:
        """Which one."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A session at rest."""

    owner: str
    tokens: tuple[int, ...]
    """One for each of its positions."""
    session: KeptSession
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a new prompt can begin with."""

    kept: Kept
    length: int
    """Tokens in common."""
    is_fork: bool
    """Whether the session stays, for its own conversation."""


class KeptSessions:
    """Finds sessions again. The least recently used one goes first."""

    def __init__(self, config: KeptConfig) -> None:
        self._config = config
        self._kept: OrderedDict[SessionId, Kept] = OrderedDict()

    @property
    def num_sessions(self) -> int:
        """Sessions at rest."""
        return len(self._kept)

    @property
    def num_tokens(self) -> int:
        """Positions of all of them."""
        return sum(len(kept.tokens) for kept in self._kept.values())

    def put(self, kept: Kept) -> None:
        """Keep a session; it, or others, may be closed for it."""
        if len(kept.tokens) < SHARED_MIN or len(kept.tokens) > self._config.tokens_max:
            kept.session.close()
            return
        self._kept[kept.session.id] = kept
        while (
            len(self._kept) > self._config.sessions_max or self.num_tokens > self._config.tokens_max
        ):
            self.drop(next(iter(self._kept.values())))

    def find(self, owner: str, ids: Sequence[int], now_s: float) -> Match | None:
        """The session of `owner` that has most of `ids`; a session to take is out of here.

        At least one token is left over, which asks for a row.
        """
        self.expire(now_s)
        best, length, wanted = None, 0, tuple(ids)
        for kept in self._kept.values():
            if kept.owner == owner and (common := _common(kept.tokens, wanted)) > length:
                best, length = kept, common
        if best is None or length < SHARED_MIN:
            return None
        is_fork = 2 * length < len(best.tokens)
        if is_fork and length < FORK_MIN:
            return None
        if is_fork:
            self._kept.move_to_end(best.session.id)
        else:
            del self._kept[best.session.id]
        return Match(kept=best, length=length, is_fork=is_fork)

    def expire(self, now_s: float) -> None:
        """Close those that nobody came back to."""
        for kept in list(self._kept.values()):
            if now_s - kept.at_s > self._config.ttl_s:
                self.drop(kept)

    def clear(self) -> None:
        """Close all."""
        for kept in list(self._kept.values()):
            self.drop(kept)

    def drop(self, kept: Kept) -> None:
        """Close one, wherever it is."""
        self._kept.pop(kept.session.id, None)
        try:
            kept.session.close()
        except ShoalError:
            return  # it had failed already, and is gone all the same


def _common(held: tuple[int, ...], ids: tuple[int, ...]) -> int:
    """Leading tokens that are equal, but for the last of `ids`.

    Halves are compared at once: prompts have thousands of tokens, and this runs on the loop.
    """
    low, high = 0, max(0, min(len(held), len(ids) - 1))
    if held[:high] == ids[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if held[low:middle] == ids[low:middle]:
            low = middle
        else:
            high = middle
    return low
