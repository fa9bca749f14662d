"""Which chain an answer begins on: its own choice, or a dispatcher's for all answers.

The dispatcher is `shoal.client.dispatch`; here is what the engine needs of one, and who stands
in for it where each session finds its own way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Literal, Protocol

from shoal.client.dispatch import HasChain, Seat
from shoal.plan.dispatching import Stages

Dispatch = Literal["each", "chains"]
"""each: sessions choose for themselves. chains: the fastest chain with a free place, else wait."""


class Seats(Protocol):
    """Gives out places for answers."""

    def seat(self, sessions: int = 1) -> AbstractAsyncContextManager[Seat]:
        """A place for an answer with so many sessions; waits for one.

        Raises:
            PeerBusy: none became free in time.
        """

    def beside(self, session: HasChain, sessions: int = 1) -> AbstractContextManager[None]:
        """Count an answer that goes on with a session that it had."""


class EachForItself:
    """There is always a place, anywhere."""

    @property
    def chain(self) -> Stages:
        """Wherever the session likes."""
        return ()

    def follow(self, session: HasChain) -> None:
        """Nobody counts."""

    @asynccontextmanager
    async def seat(self, sessions: int = 1) -> AsyncIterator[Seat]:
        """At once."""
        yield self

    @contextmanager
    def beside(self, session: HasChain, sessions: int = 1) -> Iterator[None]:
        """Nobody counts."""
        yield
