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


def choose_batch(waiting: Iterable[Waiting], *, budget_tokens: int) -> list[SessionKey]:
    """The sessions whose heads run next, at least one if any waits.

    Decode rows go first, one owner after the other, so that a prompt or a replay never
    delays them by more than one chunk; what is left of the budget goes to chunks by age.
    """
    decodes: list[Waiting] = []
    chunks: list[Waiting] = []
    for item in sorted(waiting, key=lambda item: item.since):
        (decodes if item.num_tokens == 1 and not item.is_replay else chunks).append(item)
    chosen: list[SessionKey] = []
    left = budget_tokens
    for item in [*_round_robin(decodes), *chunks]:
        if chosen and item.num_tokens > left:
            continue
        chosen.append(item.key)
        left -= item.num_tokens
        if left <= 0:
            break
    return chosen


def _round_robin(items: list[Waiting]) -> list[Waiting]:
    """Everybody's first, then everybody's second, and so on."""
    turns: dict[PeerId, int] = {}
    numbered: list[tuple[int, int, Waiting]] = []
    for item in items:
        turn = turns[item.owner] = turns.get(item.owner, -1) + 1
        numbered.append((turn, item.since, item))
    return [item for _, _, item in sorted(numbered, key=lambda entry: entry[:2])]
