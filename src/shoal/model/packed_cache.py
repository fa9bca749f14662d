"""The KV cache of one sequence for packed passes: contiguous per block, grown in steps.

Rows are written at a given position and become part of the sequence only by `commit`: a
pass that fails leaves them beyond the committed length, where the next pass overwrites
them. Sliding blocks keep their whole past too, so that any truncation is possible; what
attention may see of it is cut out when it is read.
Shapes: K KV heads, T positions, S new rows, H head size; keys and values are (1, K, T, H).
"""

from __future__ import annotations

from typing import Final

import torch

from shoal.base.spans import Span
from shoal.model.kv_cache import PAGE_TOKENS

_SPARE_SHARE: Final = 4
"""Grow by at least a quarter: copying stays O(1) per token at 25 % spare memory."""


class _BlockRows:
    """Keys and values of one block."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


class PackedCache:
    """Keys and values of one sequence over `span`; no memory before the first row."""

    def __init__(self, span: Span, length: int = 0) -> None:
        self.span = span
        self.length = length
        """Committed positions."""
        self._blocks: dict[int, _BlockRows] = {}

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put S rows (1, K, S, H) at position `start` of one block."""
        end = start + keys.shape[2]
        rows = self._blocks.get(block)
        if rows is None or rows.capacity < end:
            rows = self._grown(rows, keys, values, end, start)
            self._blocks[block] = rows
        rows.keys[:, :, start:end] = keys
        rows.values[:, :, start:end] = values

    def read(self, block: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of positions `start` to `end` (not included)."""
        rows = self._blocks[block]
        return rows.keys[:, :, start:end], rows.values[:, :, start:end]

    def commit(self, length: int) -> None:
        """Positions below `length`, all written, are part of the sequence now."""
        self.length = length

    def truncate(self, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left."""
        self.length = min(self.length, max(length, 0))
        return self.length

    def forked(self, length: int) -> PackedCache:
        """A copy of the first `length` positions (fewer if there are fewer)."""
        child = PackedCache(self.span, min(max(length, 0), self.length))
        if child.length:
            for block, rows in self._blocks.items():
                child._blocks[block] = self._grown(
                    rows, rows.keys, rows.values, child.length, child.length
                )
        return child

    @staticmethod
    def _grown(
        rows: _BlockRows | None,
        key_like: torch.Tensor,
        value_like: torch.Tensor,
        tokens: int,
        kept: int,
    ) -> _BlockRows:
        """New buffers for at least `tokens` positions, with the first `kept` of the old."""
        if rows is not None and rows.capacity < tokens:
            tokens = max(tokens, rows.capacity + rows.capacity // _SPARE_SHARE)
        capacity = -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
        grown = _BlockRows(_buffer(key_like, capacity), _buffer(value_like, capacity))
        if rows is not None:
            grown.keys[:, :, :kept] = rows.keys[:, :, :kept]
            grown.values[:, :, :kept] = rows.values[:, :, :kept]
        return grown


def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, head_size = like.shape
    return like.new_empty((batch, heads, capacity, head_size))
