"""The probe behind exact mode: which row tiles keep a row's bits whatever its company.

Row counts fall into classes of equal bits (`row_tiles.py`); one is kept, and decode rows
are padded or split to its counts.

Two probes, for different blindness. One runs a block of each kind on random rows: it sees
everything, but rounding to bfloat16 hides nearly all differences between kernels. The
other gives each linear layer weights and rows whose products cancel exactly, so that the
result is nothing but the rounding of sums, and another order of summation always shows.
Measured, one thread: bfloat16 on AVX-512 has {1} and {2..32} (one row differs from many in
one of some 10,000 values), float32 {1}, {2, 3} and {4..32}.

Experts and their routers have tiles of their own, see `tiled_experts.py`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from shoal.base.spans import Span
from shoal.model.onednn_linear import OneDnnLinear
from shoal.model.packed_attention import Piece
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_model import PackedModel
from shoal.model.quantized_linear import Int4Linear, Int8Linear, cancelling_copy
from shoal.model.row_tiles import (
    COUNTS,
    TILE_ROWS_MAX,
    RowTiles,
    best_counts,
    choose_class,
    fills_vectors,
    search_counts,
    tiles_of,
)
from shoal.model.rows import tensor_bytes
from shoal.model.tiled_experts import TiledExperts

__all__ = [
    "RowTiles",
    "choose_class",
    "find_tiles",
    "linear_counts",
    "search_product_counts",
    "tile_experts",
]

_OUTPUTS_MAX: Final = 512
"""Outputs of a cancelling layer that differ; the others repeat them, to save drawing."""

_PREFIX_ROWS: Final = 5
"""Cached positions before the probe's rows, so that attention has something to weigh."""


def find_tiles(model: PackedModel, device: str) -> RowTiles | None:
    """The row tiles of all blocks of `model`, or None where there are none.

    Experts are tiled from then on, until `model.experts.reset`. Takes some 100 block times.
    Call it on the thread that runs the blocks: kernels depend on its number of threads.
    """
    digest = hashlib.blake2b(digest_size=8, person=b"shoal-tiles")
    if model.experts:
        probed = tile_experts(model.experts)
        if probed is None:
            return None
        digest.update(probed)
    counts = set(COUNTS)
    for block in model.block_kinds():
        probe = _Probe(model, block, device)
        counts &= best_counts(probe.run)
        linears = [module for module in model.modules(block) if _is_linear(module)]
        for linear in linears:
            found, bits = _probed_linear(linear)
            counts &= found
            digest.update(bits)
        widths = [width for linear in linears for width in _widths(linear)]
        counts = {count for count in counts if fills_vectors(count, widths)}
    tiles = tiles_of(counts, digest.hexdigest())
    if tiles is None:
        model.experts.reset()
    return tiles


def tile_experts(experts: TiledExperts) -> bytes | None:
    """Find tiles for experts and routers and use them; the bits of the probe.

    None, and nothing changed, where there are no tiles.
    """
    if not experts.can_be_tiled:
        return None
    digest = hashlib.blake2b(digest_size=16, person=b"shoal-tiles")
    counts, router_counts = set(COUNTS), set(COUNTS)
    for kind in _kinds(experts.experts, ("gate_up_proj", "down_proj")):
        for name in ("gate_up_proj", "down_proj"):
            cancelling = _cancelling_expert(kind, name)
            counts &= best_counts(cancelling.run)
            digest.update(cancelling.bits())
        inner, outer = kind.down_proj[0].shape
        item_bytes = kind.down_proj.element_size()
        widths = [(inner, item_bytes), (outer, item_bytes)]
        counts = {count for count in counts if fills_vectors(count, widths)}
    for kind in _kinds(experts.routers, ("weight",)):
        cancelling = _cancelling_router(kind)
        router_counts &= best_counts(cancelling.run)
        digest.update(cancelling.bits())
        widths = [(kind.weight.shape[0], kind.weight.element_size())]
        router_counts = {count for count in router_counts if fills_vectors(count, widths)}
    tiles, router_tiles = tiles_of(counts), tiles_of(router_counts)
    if tiles is None or router_tiles is None:
        return None
    experts.use(tiles, router_tiles)
    digest.update(repr((tiles.counts, router_tiles.counts)).encode())
    return digest.digest()


def linear_counts(linear: torch.nn.Module) -> set[int]:
    """The row counts among which this layer alone keeps a row's bits."""
    widths = _widths(linear)
    counts, _ = _probed_linear(linear)
    return {count for count in counts if fills_vectors(count, widths)}


def search_product_counts(like: torch.Tensor) -> Generator[None, None, set[int]]:
    """The row counts among which a row of `rows @ weight.T` keeps its bits.

    For all weights `like` (outputs, inputs), whose values don't matter. Stops on the way, so
    that others get the thread: 1024 outputs of 4096 inputs take 0.5 s in all on one thread.
    """
    values, rows = _cancelling_values(like.shape, like)
    product = _Cancelling(lambda tile: functional.linear(tile, values), rows)
    return (yield from search_counts(product.run))


def _kinds(modules: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """One module for each set of shapes."""
    kinds = {(type(m), *(getattr(m, name).shape for name in names)): m for m in modules}
    return list(kinds.values())


def _is_linear(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.dim() == 2
    if isinstance(module, Int8Linear | Int4Linear | OneDnnLinear):
        return True
    return is_plain and isinstance(module, torch.nn.Linear | Conv1D)


def _widths(linear: torch.nn.Module) -> list[tuple[int, int]]:
    """(values, bytes of each) of the rows before and behind a layer."""
    if isinstance(linear, Int8Linear | Int4Linear):
        # Their own arithmetic; the model's rows are as wide or wider in bytes.
        item_bytes = torch.bfloat16.itemsize
        return [(linear.in_features, item_bytes), (linear.out_features, item_bytes)]
    if isinstance(linear, OneDnnLinear):
        item_bytes = linear.item_bytes
        return [(linear.in_features, item_bytes), (linear.out_features, item_bytes)]
    return [
        (width, weight.element_size()) for weight in linear.parameters() for width in weight.shape
    ]


class _Cancelling:
    """A product whose exact results are zero: what comes out is the order of its sums."""

    def __init__(self, product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
        self._product = product
        self._rows = rows

    def bits(self) -> bytes:
        """All results, to compare machines."""
        result = self.run(range(TILE_ROWS_MAX), TILE_ROWS_MAX).float()
        return bytes(tensor_bytes(result.cpu()))

    @torch.inference_mode()
    def run(self, numbers: Sequence[int], num_rows: int) -> torch.Tensor:
        """The results of these rows in a product of `num_rows`."""
        rows = self._rows.new_zeros((num_rows, self._rows.shape[1]))
        rows[: len(numbers)] = self._rows[list(numbers)]
        return self._product(rows)[: len(numbers)]


def _probed_linear(linear: torch.nn.Module) -> tuple[frozenset[int], bytes]:
    """The row counts among which a layer keeps a row's bits, and the bits of its probe."""
    if isinstance(linear, OneDnnLinear):
        return _probed_onednn(
            linear.in_features, linear.out_features, linear.bias is not None, linear.dtype,
            torch.get_num_threads(),
        )  # fmt: skip
    cancelling = _cancelling_linear(linear)
    return frozenset(best_counts(cancelling.run)), cancelling.bits()


@functools.cache
def _probed_onednn(
    inputs: int, outputs: int, has_bias: bool, dtype: torch.dtype, _threads: int
) -> tuple[frozenset[int], bytes]:
    """The same of a layer in oneDNN's layout: its shape decides, so a process asks only once.

    A node of a ring has asked with its made-up block when its own blocks fill the memory.
    """
    values, rows = _cancelling_values((outputs, inputs), torch.empty(0, dtype=dtype))
    with torch.device("meta"):
        plain = torch.nn.Linear(inputs, outputs, has_bias, dtype=dtype)
    plain.weight = torch.nn.Parameter(values, requires_grad=False)
    if has_bias:
        plain.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=dtype), requires_grad=False)
    packed = OneDnnLinear(plain)
    del plain, values  # they would be there twice while the packed ones are multiplied with
    cancelling = _Cancelling(lambda tile: packed(tile.unsqueeze(0))[0], rows)
    return frozenset(best_counts(cancelling.run)), cancelling.bits()


def _cancelling_linear(linear: torch.nn.Module) -> _Cancelling:
    if isinstance(linear, Int8Linear | Int4Linear):
        generator = torch.Generator().manual_seed(20_26)
        quantized, rows = cancelling_copy(linear, TILE_ROWS_MAX, generator)
        return _Cancelling(lambda tile: quantized(tile.unsqueeze(0))[0], rows)
    copied, rows = _with_cancelling_weight(linear, is_transposed=isinstance(linear, Conv1D))
    return _Cancelling(lambda tile: copied(tile.unsqueeze(0))[0], rows)


def _cancelling_router(router: Any) -> _Cancelling:
    """The scores are compared; what follows works on each row by itself."""
    copied, rows = _with_cancelling_weight(router, is_transposed=False)
    forward = type(router).forward
    return _Cancelling(lambda tile: forward(copied, tile)[0], rows)


def _cancelling_expert(experts: Any, name: str) -> _Cancelling:
    weight = getattr(experts, name)[0]
    values, rows = _cancelling_values((weight.T if experts.is_transposed else weight).shape, weight)
    if experts.is_transposed:
        values = values.T.contiguous().T
    bias = values.new_zeros(values.shape[0]) if experts.has_bias else None
    return _Cancelling(lambda tile: functional.linear(tile, values, bias), rows)


def _with_cancelling_weight(module: Any, *, is_transposed: bool) -> tuple[Any, torch.Tensor]:
    """A copy of a module with a matrix `weight` and perhaps a `bias`, and rows for it."""
    copied = copy.copy(module)
    copied._parameters = dict(module._parameters)
    weight = module.weight
    values, rows = _cancelling_values((weight.T if is_transposed else weight).shape, weight)
    values = values.T.contiguous() if is_transposed else values
    copied._parameters["weight"] = torch.nn.Parameter(values, requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None:
        zeros = torch.zeros_like(bias)
        copied._parameters["bias"] = torch.nn.Parameter(zeros, requires_grad=False)
    return copied, rows


def _cancelling_values(
    shape: Sequence[int], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of this shape (outputs, inputs), and rows, whose products are zero.

    In the dtype and on the device of `like`. Wide copies are made of few outputs only.
    """
    generator = torch.Generator().manual_seed(20_26)
    outputs, inputs = shape
    pairs = inputs // 2
    order = torch.randperm(inputs, generator=generator)
    halves = torch.randn(min(outputs, _OUTPUTS_MAX), pairs, generator=generator)
    odd = torch.zeros(len(halves), inputs - 2 * pairs)
    few = torch.cat([halves, halves, odd], dim=1)[:, order].to(like)
    values = few.new_empty(outputs, inputs)
    for part in torch.split(values, len(few)):
        part.copy_(few[: len(part)])
    rows = torch.randn(TILE_ROWS_MAX, pairs, generator=generator)
    odd = torch.zeros(TILE_ROWS_MAX, inputs - 2 * pairs)
    return values, torch.cat([rows, -rows, odd], dim=1)[:, order].to(like)


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

    @torch.inference_mode()
    def run(self, numbers: Sequence[int], num_rows: int) -> torch.Tensor:
        """What the block makes of these rows in a pass of `num_rows`."""
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
