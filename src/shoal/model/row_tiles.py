"""Row tiles: row counts within which a row of a product has the same bits, and their search.

Libraries choose their kernels by the number of rows, and other kernels sum in another
order. Row counts fall into classes: within one, a row has the same bits wherever it stands
and whoever stands beside it. Pure but for the computation that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

TILE_ROWS_MAX: Final = 32
"""Largest tile: above this even bfloat16 was not stable everywhere (64 rows on AMX)."""

COUNTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Row counts that are tried: others are padded to the next."""

_USEFUL_ROWS: Final = 8
"""A class must reach this: batching fewer rows gains too little."""

_VECTOR_BYTES: Final = 128
"""Two vectors of AVX-512, the step of torch's vectorised loops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """Row counts, rising, among which a row's bits don't change."""

    counts: tuple[int, ...]
    probe: str
    """Hash of the probe's bits: machines that differ in it sum in other orders."""

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
        """Whether there is hardly any padding: one row, at worst, becomes two."""
        return self.counts[0] <= 2 and self.counts[-1] == TILE_ROWS_MAX


def tiles_of(counts: Iterable[int], probe: str = "") -> RowTiles | None:
    """Tiles of these counts; None where they don't reach far enough to be useful."""
    rising = tuple(sorted(counts))
    if not rising or rising[-1] < _USEFUL_ROWS:
        return None
    return RowTiles(counts=rising, probe=probe)


def choose_class(classes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The class to keep: useful, then with the least padding, then with the largest tile."""
    useful = [tuple(sorted(counts)) for counts in classes if max(counts) >= _USEFUL_ROWS]
    return min(useful, key=lambda counts: (counts[0], -counts[-1]), default=())


def best_counts(run: Callable[[Sequence[int], int], torch.Tensor]) -> set[int]:
    """The best class of a computation.

    `run(numbers, num_rows)` gives the results of these rows, numbered below
    `TILE_ROWS_MAX`, in a pass of `num_rows`.
    """
    search = search_counts(run)
    while True:
        try:
            next(search)
        except StopIteration as end:
            found: set[int] = end.value
            return found


def search_counts(
    run: Callable[[Sequence[int], int], torch.Tensor],
) -> Generator[None, None, set[int]]:
    """`best_counts`, with a stop before each row count that is tried."""
    return set(choose_class((yield from _classes(run))))


def fills_vectors(count: int, widths: Iterable[tuple[int, int]]) -> bool:
    """Whether `count` rows of each width (values, bytes of a value) are whole vectors.

    Activation functions run over all rows at once; what is left over at the very end goes
    through scalar code, which rounds differently.
    """
    return all(count * width * item_bytes % _VECTOR_BYTES == 0 for width, item_bytes in widths)


def _classes(
    run: Callable[[Sequence[int], int], torch.Tensor],
) -> Generator[None, None, list[list[int]]]:
    """`COUNTS` in classes of equal bits; counts whose rows depend on their place are left out."""
    classes: list[tuple[list[int], torch.Tensor]] = []
    for count in reversed(COUNTS):
        yield
        rows = _stable_rows(run, count)
        if rows is None:
            continue
        for counts, reference in classes:
            if torch.equal(rows, reference[:count]):
                counts.append(count)
                break
        else:
            classes.append(([count], rows))
    return [counts for counts, _ in classes]


def _stable_rows(
    run: Callable[[Sequence[int], int], torch.Tensor], count: int
) -> torch.Tensor | None:
    """The first `count` rows' results, or None when their place or company matters."""
    numbers = list(range(count))
    straight = run(numbers, count)
    if not torch.equal(straight, run(numbers[::-1], count).flip(0)):
        return None
    half = max(count // 2, 1)
    if not torch.equal(straight[:half], run(numbers[:half], count)):
        return None
    # Rows from the far end as company for the first one, in every quarter of the tile.
    for place in {0, count // 4, count // 2, count - 1}:
        others = list(range(TILE_ROWS_MAX - 1, TILE_ROWS_MAX - count, -1))
        others.insert(place, 0)
        if not torch.equal(straight[0], run(others, count)[place]):
            return None
    return straight
