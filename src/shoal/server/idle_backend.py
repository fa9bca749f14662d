"""A backend without blocks: what a server has while it waits for some, or gave its last ones up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoal.base.adapters import AdapterId
from shoal.base.backend import BackendFacts, Call, NoAdapters, Outcome, SequenceId
from shoal.base.errors import InternalError, PeerBusy
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer


class IdleBackend(NoAdapters):
    """Takes no sequences; `facts` are those of a real backend, but for the blocks."""

    def __init__(self, facts: BackendFacts) -> None:
        self._facts = replace(facts, span=Span(0, 0))

    @property
    def facts(self) -> BackendFacts:
        """No blocks; the rest is what it was made with."""
        return self._facts

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Refuse.

        Raises:
            PeerBusy: always.
        """
        raise PeerBusy(f"no blocks are served here now, nor {span}", retry_after_s=1.0)

    def close(self, sequence: SequenceId) -> None:
        """There are none."""

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Raise InternalError: there are no sequences."""
        raise InternalError(f"sequence {sequence} of a backend without blocks")

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Raise InternalError: there are no sequences."""
        raise InternalError(f"sequence {parent} of a backend without blocks")

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """No calls, no outcomes."""
        return [InternalError("a backend without blocks") for _ in calls]

    def trainer(self) -> BlockTrainer | None:
        """None."""
        return None

    async def aclose(self) -> None:
        """Nothing to free."""


def _no_blocks() -> PeerBusy:
    return PeerBusy("no blocks are served here now", retry_after_s=1.0)
