"""Row tiles: how many rows a pass must have so that company never changes a row's bits.

Libraries choose their kernels by the number of rows, and other kernels sum in another
order. Row counts fall into classes: within one, a row has the same bits wherever it stands
and whoever stands beside it. Probes find the classes; one is kept, and decode rows are
padded or split to its counts.

Two probes, for different blindness. One runs a block of each kind on random rows: it sees
everything, but rounding to bfloat16 hides nearly all differences between kernels. The
other gives each linear layer weights and rows whose products cancel exactly, so that the
result is nothing but the rounding of sums, and another order of summation always shows.
Measured, one thread: bfloat16 on AVX-512 has {1} and {2..32} (one row differs from many in
one of some 10,000 values), float32 {1}, {2, 3} and {4..32}.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.pytorch_utils import Conv1D

from shoal.base.spans import Span
from shoal.model.packed_attention import Piece
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_model import PackedModel
from shoal.model.quantized_linear import Int4Linear, Int8Linear, cancelling_copy
from shoal.model.rows import tensor_bytes

TILE_ROWS_MAX: Final = 32
"""Largest tile: above this even bfloat16 was not stable everywhere (64 rows on AMX)."""

COUNTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Row counts that are tried: others are padded to the next."""

_USEFUL_ROWS: Final = 8
"""A class must reach this: batching fewer rows gains too little."""

_VECTOR_BYTES: Final = 128
"""Two vectors of AVX-512, the step of torch's vectorised loops."""

_OUTPUTS_MAX: Final = 512
"""Outputs of a cancelling layer that differ; the others repeat them, to save drawing."""

_PREFIX_ROWS: Final = 5
"""Cached positions before the probe's rows, so that attention has something to weigh."""


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


def find_tiles(model: PackedModel, device: str) -> RowTiles | None:
    """The row tiles of all blocks of `model`, or None where there are none.

    Takes some 100 block times. Call it on the thread that runs the blocks: kernels depend
    on its number of threads.
    """
    if model.has_experts():
        return None
    counts = set(COUNTS)
    digest = hashlib.blake2b(digest_size=8, person=b"shoal-tiles")
    for block in model.block_kinds():
        probe = _Probe(model, block, device)
        counts &= set(choose_class(_classes(probe.stable_rows)))
        linears = [module for module in model.modules(block) if _is_linear(module)]
        for linear in linears:
            cancelling = _CancellingLinear(linear)
            counts &= set(choose_class(_classes(cancelling.stable_rows)))
            digest.update(cancelling.bits())
        counts = {count for count in counts if _fills_vectors(count, linears)}
    if not counts or max(counts) < _USEFUL_ROWS:
        return None
    return RowTiles(counts=tuple(sorted(counts)), probe=digest.hexdigest())


def choose_class(classes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The class to keep: useful, then with the least padding, then with the largest tile."""
    useful = [tuple(sorted(counts)) for counts in classes if max(counts) >= _USEFUL_ROWS]
    return min(useful, key=lambda counts: (counts[0], -counts[-1]), default=())


def _classes(stable_rows: Callable[[int], torch.Tensor | None]) -> list[list[int]]:
    """`COUNTS` in classes of equal bits; counts whose rows depend on their place are left out."""
    classes: list[tuple[list[int], torch.Tensor]] = []
    for count in reversed(COUNTS):
        rows = stable_rows(count)
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
    """The first `count` rows' results, or None when their place or company matters.

    `run(numbers, num_rows)` gives the results of these rows in a pass of `num_rows`.
    """
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


def _is_linear(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.dim() == 2
    if isinstance(module, Int8Linear | Int4Linear):
        return True
    return is_plain and isinstance(module, torch.nn.Linear | Conv1D)


def _fills_vectors(count: int, linears: Sequence[torch.nn.Module]) -> bool:
    """Whether `count` rows of every width are whole vectors.

    Activation functions run over all rows at once; what is left over at the very end goes
    through scalar code, which rounds differently.
    """
    return all(
        count * width * item_bytes % _VECTOR_BYTES == 0
        for linear in linears
        for width, item_bytes in _widths(linear)
    )


def _widths(linear: torch.nn.Module) -> list[tuple[int, int]]:
    """(values, bytes of each) of the rows before and behind a layer."""
    if isinstance(linear, Int8Linear | Int4Linear):
        # Their own arithmetic; the model's rows are as wide or wider in bytes.
        item_bytes = torch.bfloat16.itemsize
        return [(linear.in_features, item_bytes), (linear.out_features, item_bytes)]
    return [
        (width, weight.element_size()) for weight in linear.parameters() for width in weight.shape
    ]


class _CancellingLinear:
    """A linear layer whose exact results are zero: what comes out is the order of its sums."""

    def __init__(self, linear: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(20_26)
        self._linear: torch.nn.Module
        if isinstance(linear, Int8Linear | Int4Linear):
            self._linear, self._rows = cancelling_copy(linear, TILE_ROWS_MAX, generator)
            return
        self._linear = copy.copy(linear)
        self._linear._parameters = dict(linear._parameters)
        weight: Any = linear.weight
        is_linear = isinstance(linear, torch.nn.Linear)
        outputs, inputs = weight.shape if is_linear else reversed(weight.shape)
        pairs = inputs // 2
        order = torch.randperm(inputs, generator=generator)
        halves = torch.randn(min(outputs, _OUTPUTS_MAX), pairs, generator=generator)
        halves = halves.repeat(-(-outputs // len(halves)), 1)[:outputs]
        odd = torch.zeros(outputs, inputs - 2 * pairs)
        values = torch.cat([halves, halves, odd], dim=1)[:, order].to(weight)
        rows = torch.randn(TILE_ROWS_MAX, pairs, generator=generator)
        odd = torch.zeros(TILE_ROWS_MAX, inputs - 2 * pairs)
        self._rows = torch.cat([rows, -rows, odd], dim=1)[:, order].to(weight)
        values = values if is_linear else values.T.contiguous()
        self._linear._parameters["weight"] = torch.nn.Parameter(values, requires_grad=False)
        bias = linear._parameters.get("bias")
        if bias is not None:
            zeros = torch.zeros_like(bias)
            self._linear._parameters["bias"] = torch.nn.Parameter(zeros, requires_grad=False)

    def stable_rows(self, count: int) -> torch.Tensor | None:
        """See `_stable_rows`."""
        return _stable_rows(self._run, count)

    def bits(self) -> bytes:
        """All results, to compare machines."""
        result = self._run(range(TILE_ROWS_MAX), TILE_ROWS_MAX).float()
        return bytes(tensor_bytes(result.cpu()))

    @torch.inference_mode()
    def _run(self, numbers: Sequence[int], num_rows: int) -> torch.Tensor:
        rows = self._rows.new_zeros((1, num_rows, self._rows.shape[1]))
        rows[0, : len(numbers)] = self._rows[list(numbers)]
        result: torch.Tensor = self._linear(rows)
        return result[0, : len(numbers)]


class _Probe:
    """One block and 32 seeded rows, each of a sequence of its own."""

    @torch.inference_mode()
    def __init__(self, model: PackedModel, block: int, device: str) -> None:
        self._model = model
        self._span = Span(block, block + 1)
        generator = torch.Generator().manual_seed(20_26)
        shape = (TILE_ROWS_MAX, model.hidden_size)
        self._rows = torch.randn(shape, generator=generator).to(device, model.dtype)
        prefix = torch.randn(_PREFIX_ROWS, model.hidden_size, generator=generator)
        whole = PackedCache(model.windows, self._span)
        piece = Piece(cache=whole, start=0, count=_PREFIX_ROWS, by_position=False)
        model.run([piece], prefix.to(device, model.dtype), self._span)
        whole.commit(_PREFIX_ROWS)
        self._caches = [whole.forked(1 + index % _PREFIX_ROWS) for index in range(TILE_ROWS_MAX)]

    def stable_rows(self, count: int) -> torch.Tensor | None:
        """See `_stable_rows`."""
        return _stable_rows(self._run, count)

    @torch.inference_mode()
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
