"""The client's head, applied once to all rows that arrived together.

A frame of the last server holds rows of many sessions. Each session's task wakes up in the
same turn of the event loop and asks here for its token; the call that was put behind them
answers all at once.
"""

from __future__ import annotations

import asyncio

import torch

from shoal.hf.head import Head


class HeadBatch:
    """Greedy tokens of rows, many at a time."""

    def __init__(self, head: Head, encoding: str) -> None:
        self.num_calls = 0
        self.num_rows = 0
        self._head = head
        self._encoding = encoding
        self._waiting: list[tuple[bytes, asyncio.Future[int]]] = []

    async def token(self, row: bytes) -> int:
        """The likeliest token after this row."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._apply)
        self._waiting.append((row, future))
        return await future

    def embed(self, token: int) -> bytes:
        """The token's row for block 0."""
        return self._head.embed([token], self._encoding)

    def _apply(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.num_calls += 1
        self.num_rows += len(waiting)
        scores = self._head.logits(b"".join(row for row, _ in waiting), self._encoding)
        tokens = torch.argmax(scores, dim=1).tolist()
        for (_, future), token in zip(waiting, tokens, strict=True):
            if not future.done():
                future.set_result(token)
