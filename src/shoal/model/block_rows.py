"""Keys and values of one block of one sequence: contiguous, grown in steps, bounded by windows.

A block with a sliding window never shows attention more than the window's positions. It
keeps these and `ROLLBACK_TOKENS` more, so that a sequence can be cut back a little, and
drops what lies further back when the buffer is full: in whole pages and many at once, so
that copying stays O(1) per token. Blocks without a window keep everything.
Shapes: K KV heads, S new rows, H head size; keys and values are (1, K, positions, H).
"""

from __future__ import annotations

from typing import Final

import torch

from shoal.base.errors import InternalError

PAGE_TOKENS: Final = 32
"""Buffers are whole pages: the unit that servers account in. They begin at a multiple of it
too, so that a position's place relative to vector width is the same in every buffer."""

ROLLBACK_TOKENS: Final = 64
"""Committed positions that a sequence with sliding windows can always be cut back by: more
than the longest draft that a step verifies (8 rows in exact mode, trees of some tens
elsewhere). Going back further means a replay. Costs 64 positions per sequence and block,
next to windows of 128 (gpt_oss) to 4,096 (mistral)."""

_SPARE_SHARE: Final = 4
"""Grow by at least a quarter: copying stays O(1) per token at 25 % spare memory."""


def kept_tokens(window: int) -> int:
    """Positions that a block with this window keeps at least, once there are as many."""
    return window - 1 + ROLLBACK_TOKENS


def first_visible(position: int, window: int | None) -> int:
    """The first position that attention at `position` sees."""
    return 0 if window is None else max(position - window + 1, 0)


class BlockRows:
    """Keys and values of the positions from `first` on; no memory before the first write."""

    __slots__ = ("_held", "_window", "first")

    def __init__(self, window: int | None) -> None:
        self._window = window
        self.first = 0
        """The first position held: a multiple of PAGE_TOKENS."""
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Positions that there is memory for."""
        return 0 if self._held is None else self._held[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return 0 if self._held is None else sum(half.nbytes for half in self._held)

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor, committed: int) -> None:
        """Put S rows at position `start`, behind rows that were written before.

        Whatever a cut of `committed` positions by up to ROLLBACK_TOKENS needs stays.
        """
        end = start + keys.shape[2]
        held = self._held
        if held is None or end - self.first > held[0].shape[2]:
            held = self._make_room((keys, values), start, end, committed)
        here, there = start - self.first, end - self.first
        held[0][:, :, here:there] = keys
        held[1][:, :, here:there] = values

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of positions `start` to `end` (not included).

        Raises:
            InternalError: positions that are not held (our bug).
        """
        here, there = start - self.first, end - self.first
        held = self._held
        if held is None or here < 0 or there > held[0].shape[2]:
            places = f"{self.first} to {self.first + self.capacity}"
            raise InternalError(f"positions {start} to {end} of a cache of {places}")
        return held[0][:, :, here:there], held[1][:, :, here:there]

    def can_continue_at(self, position: int) -> bool:
        """Whether everything is held that attention at `position` sees of the past."""
        return self.first <= first_visible(position, self._window)

    def copied(self, length: int) -> BlockRows:
        """A copy of what a sequence of `length` positions keeps; see `can_continue_at`."""
        child = BlockRows(self._window)
        if self._held is not None and length:
            child.first = self._first_kept(length)
            child._held = self._moved(self._held, child.first, length, length)
        return child

    def _make_room(
        self, like: tuple[torch.Tensor, torch.Tensor], start: int, end: int, committed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New buffers up to `end`, with what must be kept of the rows before `start`."""
        first = self._first_kept(committed)
        # Taken over only when both are made: a failure leaves the block as it was.
        held = self._moved(like, first, start, max(end, first + self._roomy()))
        self._held, self.first = held, first
        return held

    def _roomy(self) -> int:
        """Positions to make room for, so that the next growth is far away."""
        grown = self.capacity + self.capacity // _SPARE_SHARE
        if self._window is None:
            return grown
        kept = kept_tokens(self._window)
        # A page more than the share: up to that much is kept for the sake of whole pages.
        return min(grown, kept + kept // _SPARE_SHARE + PAGE_TOKENS)

    def _first_kept(self, length: int) -> int:
        """Where a sequence of `length` positions may begin."""
        if self._window is None:
            return 0
        wanted = max(length - kept_tokens(self._window), 0)
        return max(self.first, wanted // PAGE_TOKENS * PAGE_TOKENS)

    def _moved(
        self, like: tuple[torch.Tensor, torch.Tensor], first: int, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for positions `first` to `end`, with our rows up to `start`."""
        capacity = -(-(end - first) // PAGE_TOKENS) * PAGE_TOKENS
        keys, values = (
            half.new_empty((half.shape[0], half.shape[1], capacity, half.shape[3])) for half in like
        )
        if self._held is not None:
            old_keys, old_values = self.read(first, start)
            keys[:, :, : start - first] = old_keys
            values[:, :, : start - first] = old_values
        return keys, values
