"""Greedy tokens by the library's own `HeadBatch`: one call for all rows that came together."""

from __future__ import annotations

import torch

from shoal.hf import head_batch
from shoal.hf.head import Head


class HeadBatch:
    """Greedy tokens of rows, many at a time."""

    def __init__(self, head: Head, encoding: str) -> None:
        self.batch = head_batch.HeadBatch(head, head_batch.find_head_tiles(head))
        self._head = head
        self._encoding = encoding

    async def token(self, row: bytes) -> int:
        """The likeliest token after this row."""
        return int(torch.argmax(await self.batch.logits(row, self._encoding)))

    def embed(self, token: int) -> bytes:
        """The token's row for block 0."""
        return self._head.embed([token], self._encoding)
