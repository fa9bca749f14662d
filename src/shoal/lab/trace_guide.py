"""A directory that shows each session the servers that the trace's session took.

Among equals a client chooses by chance and by measured speed, which no trace tells. In a replay
it should choose as it did: a session sees the servers of its own chain and of the one that
followed in the trace, with the blocks that they had there. What is lost, when, and what is then
done, the real code decides alone. When the trace's choice does not work here, it sees everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Final

from msgspec import structs

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.discovery.directory import SignedRecord, Snapshot
from shoal.discovery.static import StaticDirectory

PATIENCE_S: Final = 5.0
"""A chain that can't be had for this long is given up: the session sees everybody."""

OPENING_S: Final = 1.0
"""While a session is opened, the next choice is shown too after this."""

ASK_PAUSE_S: Final = 3.0
"""Whoever did not ask for this long begins a new search."""


Spans = dict[PeerId, Span]


class Guide:
    """Where one session goes next. `chains`: servers and blocks of each chain, in order."""

    def __init__(self, chains: Sequence[Spans]) -> None:
        self.session: ChainSession | None = None
        self._chains = chains
        self._next = 0
        self._searching_s = 0.0
        self._asked_s = float("-inf")

    @property
    def first(self) -> list[PeerId]:
        """The servers of the first chain."""
        return sorted(self._chains[0])

    def allowed(self, now_s: float) -> Spans | None:
        """Who is shown, with which blocks; None: everybody."""
        here: Spans = {}
        if self.session is not None:
            here = {stage.peer: stage.span for stage in self.session.chain}
        while self._next < len(self._chains) and self._chains[self._next] == here:
            self._next += 1
            self._asked_s = float("-inf")
        if now_s - self._asked_s > ASK_PAUSE_S:
            self._searching_s = now_s
        self._asked_s = now_s
        searched_s = now_s - self._searching_s
        if self._next == len(self._chains) or searched_s > PATIENCE_S:
            return None
        end = self._next + 1
        if self.session is None:  # the first choice may fail, as it may have done then
            end += int(searched_s / OPENING_S)
        for chain in reversed(self._chains[self._next : end]):
            for peer, span in chain.items():
                here[peer] = _hull(span, here.get(peer, span))
        return here


def _hull(span: Span, other: Span) -> Span:
    return Span(min(span.start, other.start), max(span.end, other.end))


GUIDE: Final[ContextVar[Guide | None]] = ContextVar("GUIDE", default=None)
"""Of the session whose task asks: a session's tasks inherit it from the one that opens it."""


class GuidedDirectory(StaticDirectory):
    """Shows each session what its guide allows."""

    def snapshot(self) -> Snapshot:
        """What is known now, as far as it is shown."""
        snapshot = super().snapshot()
        guide = GUIDE.get()
        allowed = None if guide is None else guide.allowed(asyncio.get_running_loop().time())
        if allowed is None:
            return snapshot
        records = tuple(
            _with_span(one, allowed[PeerId(one.record.peer)])
            for one in snapshot.records
            if one.record.peer in allowed
        )
        return replace(snapshot, records=records)


def _with_span(one: SignedRecord, span: Span) -> SignedRecord:
    """What the client decides with; servers still get the record as it was signed."""
    return replace(one, record=structs.replace(one.record, start=span.start, end=span.end))
