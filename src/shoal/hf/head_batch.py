"""The head applied once to all rows that arrived together, without one changing another.

A frame from the last server holds rows of many sessions. Their tasks wake up in the same
turn of the event loop and ask here; what was put behind them answers all at once.

Company must not change a text, so rows share a product only in row counts that were found
to leave each row's bits alone (`shoal.model.row_tiles`). Where one row would need much
padding for that (float32 on CPUs), each row is computed by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import torch

from shoal.hf.head import Head
from shoal.model.exact import linear_counts
from shoal.model.row_tiles import TILE_ROWS_MAX, RowTiles, best_counts, tiles_of
from shoal.model.rows import rows_from_bytes

_SEED: Final = 20_260_721


class HeadBatch:
    """Scores of rows that many sessions ask for, a batch at a time."""

    def __init__(self, head: Head, tiles: RowTiles | None) -> None:
        """`tiles` as `find_head_tiles` gives them; None: every row by itself."""
        self._head = head
        self._tiles = tiles
        self._waiting: list[tuple[torch.Tensor, asyncio.Future[torch.Tensor]]] = []
        self.num_calls = 0
        """How often the head was applied."""
        self.num_rows = 0

    async def logits(self, row: bytes, encoding: str) -> torch.Tensor:
        """(V,) float32 scores of one row that left the last block.

        Raises:
            BadInput: not one row, or an unknown encoding.
        """
        hidden = rows_from_bytes(row, encoding, 1, self._head.hidden_size)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[torch.Tensor] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer)
        self._waiting.append((hidden, future))
        return await future

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        step = self._rows_max
        for start in range(0, len(waiting), step):
            part = waiting[start : start + step]
            try:
                scores = self._scores([hidden for hidden, _ in part])
            except Exception as error:  # noqa: BLE001 - each asker gets it
                for _, future in part:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), row in zip(part, scores, strict=True):
                if not future.done():
                    future.set_result(row)

    def scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """(S, V) float32 scores of S rows, (1, D) each, in as many calls as keep their bits."""
        step = self._rows_max
        parts = [self._scores(rows[at : at + step]) for at in range(0, len(rows), step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def _rows_max(self) -> int:
        return 1 if self._tiles is None else self._tiles.rows_max

    def _scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        self.num_calls += 1
        self.num_rows += len(rows)
        hidden = torch.cat(list(rows))
        if self._tiles is not None:
            padding = self._tiles.padded(len(rows)) - len(rows)
            hidden = torch.cat([hidden, hidden.new_zeros((padding, hidden.shape[1]))])
        return self._head.scores(hidden)[: len(rows)]


Progress = Callable[[int, int], None]
"""Told (calls done, calls in all), at most."""

PROBE_CALLS: Final = 70
"""Calls of a probe: ten row counts, seven at most each."""


def find_head_tiles(head: Head, progress: Progress | None = None) -> RowTiles | None:
    """Row counts in which the head may take rows of several sessions; None: one by one.

    Runs the head some `PROBE_CALLS` times on seeded rows.
    """
    num_calls = 0
    generator = torch.Generator().manual_seed(_SEED)
    rows = torch.randn((TILE_ROWS_MAX, head.hidden_size), generator=generator)

    def run(numbers: Sequence[int], num_rows: int) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if progress is not None:
            progress(min(num_calls, PROBE_CALLS), PROBE_CALLS)
        padded = rows.new_zeros((num_rows, rows.shape[1]))
        padded[: len(numbers)] = rows[list(numbers)]
        return head.scores(padded.to(head.dtype))[: len(numbers)]

    # Random rows say little in 16 bits, where most sums round to the same.
    tiles = tiles_of(best_counts(run) & linear_counts(head.modules()["head"]))
    return tiles if tiles is not None and tiles.is_free else None
