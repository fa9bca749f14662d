"""The KV cache of one sequence for packed passes: contiguous per block, grown in steps.

Rows are written at a given position and become part of the sequence only by `commit`: a
pass that fails leaves them beyond the committed length, where the next pass overwrites
them. Sliding blocks keep just what their window needs and a margin, see `block_rows`.
Shapes: K KV heads, T positions, S new rows, H head size; keys and values are (1, K, T, H).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.base.spans import Span
from shoal.model.block_rows import BlockRows


class PackedCache:
    """Keys and values of one sequence over `span`; no memory before the first row.

    `windows` are those of all blocks of the model, None where a block sees everything.
    """

    def __init__(self, windows: Sequence[int | None], span: Span, length: int = 0) -> None:
        self.span = span
        self.length = length
        """Committed positions."""
        self._windows = windows
        self._blocks: dict[int, BlockRows] = {}

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(rows.num_bytes for rows in self._blocks.values())

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put S rows (1, K, S, H) at position `start` of one block."""
        rows = self._blocks.get(block)
        if rows is None:
            rows = self._blocks[block] = BlockRows(self._windows[block])
        rows.write(start, keys, values, self.length)

    def read(self, block: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of positions `start` to `end` (not included)."""
        return self._blocks[block].read(start, end)

    def commit(self, length: int) -> None:
        """Positions below `length`, all written, are part of the sequence now."""
        self.length = length

    def truncate(self, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left.

        That is 0 when a sliding block dropped what attention at `length` would see.
        """
        self.length = self._reachable(length)
        if not self.length:
            self._blocks.clear()
        return self.length

    def forked(self, length: int) -> PackedCache:
        """A copy of the first `length` positions: fewer if there are fewer, or see `truncate`."""
        child = PackedCache(self._windows, self.span, self._reachable(length))
        if child.length:
            child._blocks = {
                block: rows.copied(child.length) for block, rows in self._blocks.items()
            }
        return child

    def _reachable(self, length: int) -> int:
        wanted = min(self.length, max(length, 0))
        is_held = all(rows.can_continue_at(wanted) for rows in self._blocks.values())
        return wanted if is_held else 0
