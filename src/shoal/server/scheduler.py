"""Which waiting rows run in the next engine iteration. A pure function over the queue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.base.ids import PeerId
from shoal.server.session import SessionKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The entries at the head of one session's queue that would run together."""

    key: SessionKey
    owner: PeerId
    num_tokens: int
    is_replay: bool
    """Rows that come again to rebuild a cache; they yield to fresh decode rows."""
    since: int
    """Arrival order."""
    owner_turn: float = 0.0
    """When a chunk of this owner last ran: who waited longest goes first."""
    seniority: tuple[bool, int, bytes] | None = None
    """Of a session that is rebuilt after a loss: see `HopSession.seniority`. None: of others."""

    @property
    def is_decode(self) -> bool:
        """A fresh row of a running answer; everything else is a chunk."""
        return self.num_tokens == 1 and not self.is_replay


def choose_batch(
    waiting: Iterable[Waiting],
    *,
    budget_tokens: int,
    rows_per_owner: int | None = None,
    chunks_max: int | None = None,
    is_chunk_due: bool = False,
) -> list[SessionKey]:
    """The sessions whose heads run next, at least one if any waits.

    Decode rows go first, one owner after the other and at most `rows_per_owner` of each, so
    that a prompt or a replay never delays them by more than one chunk; what is left of the
    budget goes to at most `chunks_max` chunks, first those of the owner who waited longest.
    Sessions that are rebuilt use the turns of their owners together, the oldest first: after a
    death many wait, and taking turns would let none of them go on before all can.
    When a chunk was passed over often enough (`is_chunk_due`), the first one goes before all.
    """
    decodes: list[Waiting] = []
    chunks: list[Waiting] = []
    for item in sorted(waiting, key=lambda item: item.since):
        (decodes if item.is_decode else chunks).append(item)
    chunks.sort(key=lambda item: item.owner_turn)
    chunks = _oldest_first(chunks)
    del chunks[chunks_max if chunks_max is not None else len(chunks) :]
    first = [chunks.pop(0)] if is_chunk_due and chunks else []
    chosen: list[SessionKey] = []
    left = budget_tokens
    for item in [*first, *_round_robin(decodes, rows_per_owner), *chunks]:
        if chosen and item.num_tokens > left:
            continue
        chosen.append(item.key)
        left -= item.num_tokens
        if left <= 0:
            break
    return chosen


def _oldest_first(chunks: list[Waiting]) -> list[Waiting]:
    """The same places for rebuilt sessions as a whole, given out by seniority."""
    rebuilt = [(item.seniority, item) for item in chunks if item.seniority is not None]
    by_age = iter(sorted(rebuilt, key=lambda entry: entry[0]))
    return [item if item.seniority is None else next(by_age)[1] for item in chunks]


def _round_robin(items: list[Waiting], rounds: int | None) -> list[Waiting]:
    """Everybody's first, then everybody's second, and so on, for that many rounds."""
    turns: dict[PeerId, int] = {}
    numbered: list[tuple[int, int, Waiting]] = []
    for item in items:
        turn = turns[item.owner] = turns.get(item.owner, -1) + 1
        if rounds is None or turn < rounds:
            numbered.append((turn, item.since, item))
    return [item for _, _, item in sorted(numbered, key=lambda entry: entry[:2])]
