"""Row tiles: how many rows a pass must have so that company never changes a row's bits.

Libraries choose their kernels by the number of rows, and other kernels sum in another
order. Row counts fall into classes: within one, a row has the same bits wherever it stands
and whoever stands beside it. The probe runs one block of each kind with many row counts,
finds the classes and keeps one; decode rows are then padded or split to its counts.
Measured examples, one thread: bfloat16 on AVX-512 and AMX has one class {1..32}, float32
{1}, {2, 3}, {4..32} or {1}, {2..12}, {16..32}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from shoal.base.spans import Span
from shoal.model.packed_attention import Piece
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_model import PackedModel

TILE_ROWS_MAX: Final = 32
"""Largest tile: above this even bfloat16 was not stable everywhere (64 rows on AMX)."""

COUNTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Row counts that are tried: others are padded to the next."""

_USEFUL_ROWS: Final = 8
"""A class must reach this: batching fewer rows gains too little."""

_PREFIX_ROWS: Final = 5
"""Cached positions before the probe's rows, so that attention has something to weigh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """Row counts, rising, among which a row's bits don't change."""

    counts: tuple[int, ...]

    @property
    def rows_max(self) -> int:
        """The most rows of one pass."""
        return self.counts[-1]

    def padded(self, count: int) -> int:
        """The smallest tile for `count` rows.

        Raises:
            ValueError: more rows than the largest tile has.
        """
        for tile in self.counts:
            if tile >= count:
                return tile
        raise ValueError(f"{count} rows in tiles of at most {self.rows_max}")

    @property
    def is_free(self) -> bool:
        """Whether every count is a tile, so that hardly any padding is needed."""
        return self.counts[0] == 1 and self.counts[-1] == TILE_ROWS_MAX


def find_tiles(model: PackedModel, device: str) -> RowTiles | None:
    """The row tiles of all blocks of `model`, or None where there are none.

    Takes some 70 block times. Call it on the thread that runs the blocks: kernels depend
    on its number of threads.
    """
    if model.has_experts():
        return None
    counts = set(COUNTS)
    for block in model.block_kinds():
        best = choose_class(_classes(model, block, device))
        counts &= set(best)
    if not counts or max(counts) < _USEFUL_ROWS:
        return None
    return RowTiles(counts=tuple(sorted(counts)))


def choose_class(classes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The class to keep: useful, then with the least padding, then with the largest tile."""
    useful = [tuple(sorted(counts)) for counts in classes if max(counts) >= _USEFUL_ROWS]
    return min(useful, key=lambda counts: (counts[0], -counts[-1]), default=())


@torch.inference_mode()
def _classes(model: PackedModel, block: int, device: str) -> list[list[int]]:
    """`COUNTS` in classes of equal bits; counts whose rows depend on their place are left out."""
    probe = _Probe(model, block, device)
    classes: list[tuple[list[int], torch.Tensor]] = []
    for count in reversed(COUNTS):
        rows = probe.stable_rows(count)
        if rows is None:
            continue
        for counts, reference in classes:
            if torch.equal(rows, reference[:count]):
                counts.append(count)
                break
        else:
            classes.append(([count], rows))
    return [counts for counts, _ in classes]


class _Probe:
    """One block and 32 seeded rows, each of a sequence of its own."""

    def __init__(self, model: PackedModel, block: int, device: str) -> None:
        self._model = model
        self._span = Span(block, block + 1)
        generator = torch.Generator().manual_seed(20_26)
        shape = (TILE_ROWS_MAX, model.hidden_size)
        self._rows = torch.randn(shape, generator=generator).to(device, model.dtype)
        prefix = torch.randn(_PREFIX_ROWS, model.hidden_size, generator=generator)
        whole = PackedCache(self._span)
        piece = Piece(cache=whole, start=0, count=_PREFIX_ROWS, by_position=False)
        model.run([piece], prefix.to(device, model.dtype), self._span)
        whole.commit(_PREFIX_ROWS)
        self._caches = [whole.forked(1 + index % _PREFIX_ROWS) for index in range(TILE_ROWS_MAX)]

    def stable_rows(self, count: int) -> torch.Tensor | None:
        """The first `count` rows' results, or None when their place or company matters."""
        numbers = list(range(count))
        straight = self._run(numbers, count)
        if not torch.equal(straight, self._run(numbers[::-1], count).flip(0)):
            return None
        half = max(count // 2, 1)
        if not torch.equal(straight[:half], self._run(numbers[:half], count)):
            return None
        # Rows from the far end as company for the first one, in every quarter of the tile.
        for place in {0, count // 4, count // 2, count - 1}:
            others = list(range(TILE_ROWS_MAX - 1, TILE_ROWS_MAX - count, -1))
            others.insert(place, 0)
            if not torch.equal(straight[0], self._run(others, count)[place]):
                return None
        return straight

    def _run(self, numbers: Sequence[int], num_rows: int) -> torch.Tensor:
        pieces = [
            Piece(
                cache=self._caches[number],
                start=self._caches[number].length,
                count=1,
                by_position=True,
            )
            for number in numbers
        ]
        return self._model.run(pieces, self._rows[list(numbers)], self._span, num_rows)
