"""Linear layers with int8 or int4 weights for CPUs.

Weights only: rows are multiplied in bfloat16 whatever the model's dtype, and sums are kept
in float32 inside the kernels. torch's packed kernels read the small weights once per row:
fastest for the few rows of decode, slow for many (`benchmarks/quantized.py`). Above a
measured number of rows a tile of weights at a time is turned into bfloat16 instead, while
it is in the processor's cache.
Shapes: S rows, I input and O output features, G the 32 inputs of a group, W columns that a packed
block interleaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from shoal.base.errors import ModelUnsupported
from shoal.model.training_linear import frozen_product

INT8_PACKED_ROWS_MAX: Final = 32
"""Most rows for the packed int8 kernel. Measured on one AVX-512 thread, 2048 -> 5632: 16
rows 2.3 ms against 3.1 ms by way of bfloat16, 32 rows 4.6 against 4.0, 64 rows 9.3 against
5.6. Kept at 32 so that all row tiles of exact mode use one kernel."""

INT4_PACKED_ROWS_MAX: Final = 64
"""The same for int4, whose weights take longer to unfold: 64 rows 9.3 ms against 10.5 ms,
128 rows 18.7 against 14.1."""

INT4_GROUP: Final = 32
"""Values that share a scale and an offset: 5 bits per weight. 64 would be 4.5 bits, but took
the demo model's perplexity from 87 to 119 instead of 106 (groups shifted, see the benchmark),
and fits fewer widths."""

_TILE_COLUMNS: Final = 256
"""Outputs that are unfolded at once: 1 MB of bfloat16 at 2048 inputs, less than a cache."""

_SLAB_VALUES: Final = 1 << 20
"""Weights that are quantised at once: bounds the float32 copies, of which there are six at a
time, to some 4 MB each."""

_INT8_MAX: Final = 127
_INT4_LEVELS: Final = 16
_INT4_MIDDLE: Final = 8
"""Stored values 0..15 mean -8..7 times the scale, plus the offset."""

_OUTPUTS_MULTIPLE: Final = 64
"""Outputs are filled up to this, so that all packed blocks are whole."""


class Int8Linear(torch.nn.Module):
    """A linear layer with one symmetric int8 scale per output. O + 2 bytes * O in memory."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        slabs = [_int8_slab(slab) for slab in _slabs(linear.weight.detach())]
        self.values = _constant(torch.cat([values for values, _ in slabs]))
        self.scales = _constant(torch.cat([scales for _, scales in slabs]))
        self.bias = None if linear.bias is None else _constant(linear.bias.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., O) in the rows' dtype."""
        if torch.is_grad_enabled():
            return frozen_product(self, rows)
        return self.product(rows)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """The same without gradients."""
        return _in_bfloat16(rows, self._product, self.bias)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] <= INT8_PACKED_ROWS_MAX:
            product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(
                rows, self.values, self.scales
            )
            return product
        tiles = [
            functional.linear(rows, values.to(torch.bfloat16))
            for values in torch.split(self.values, _TILE_COLUMNS)
        ]
        return torch.cat(tiles, dim=1).mul_(self.scales)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """(..., I) from the gradient (..., O) of the result; sums of tiles in float32."""
        flat = gradient.reshape(-1, self.out_features).to(torch.bfloat16) * self.scales
        result = gradient.new_zeros((flat.shape[0], self.in_features), dtype=torch.float32)
        parts = torch.split(flat, _TILE_COLUMNS, dim=1)
        for part, values in zip(parts, torch.split(self.values, _TILE_COLUMNS), strict=True):
            result += part @ values.to(torch.bfloat16)
        return result.to(gradient.dtype).reshape(*gradient.shape[:-1], self.in_features)

    def dequantized(self) -> torch.Tensor:
        """(O, I) float32: the weights that it computes with."""
        return self.values.float() * self.scales.float().unsqueeze(1)


class Int4Linear(torch.nn.Module):
    """A linear layer with 4-bit weights; groups of 32 inputs share a scale and an offset.

    Raises:
        ModelUnsupported: input features that groups of 32 don't divide, or a processor on
            which torch packs weights in an order that we don't know.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        _check_int4_width(linear.in_features)
        self._layout = packed_layout()
        slabs = [_int4_slab(slab) for slab in _slabs(linear.weight.detach())]
        self.packed = _constant(torch.cat([packed for packed, _ in slabs]))
        # (I / G, O, 2), as the kernel wants them: scales and offsets.
        self.scales = _constant(torch.cat([scales for _, scales in slabs], dim=1))
        self.bias = None if linear.bias is None else _constant(linear.bias.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., O) in the rows' dtype."""
        if torch.is_grad_enabled():
            return frozen_product(self, rows)
        return self.product(rows)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """The same without gradients."""
        return _in_bfloat16(rows, self._product, self.bias)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] <= INT4_PACKED_ROWS_MAX:
            product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self.packed, INT4_GROUP, self.scales
            )
        else:
            columns = self.packed.shape[0]
            product = rows.new_empty(rows.shape[0], columns)
            width = self._layout.width
            for start in range(0, columns, _TILE_COLUMNS):
                tile = self._unfolded(start, min(start + _TILE_COLUMNS, columns))
                for number, block in enumerate(tile):
                    at = start + number * width
                    product[:, at : at + width] = rows @ block
        return product[:, : self.out_features]

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """(..., I) from the gradient (..., O) of the result; sums of tiles in float32."""
        columns, width = self.packed.shape[0], self._layout.width
        flat = gradient.reshape(-1, self.out_features).to(torch.bfloat16)
        flat = functional.pad(flat, (0, columns - self.out_features))
        result = gradient.new_zeros((flat.shape[0], self.in_features), dtype=torch.float32)
        for start in range(0, columns, _TILE_COLUMNS):
            tile = self._unfolded(start, min(start + _TILE_COLUMNS, columns))
            for number, block in enumerate(tile):
                at = start + number * width
                result += flat[:, at : at + width] @ block.t()
        return result.to(gradient.dtype).reshape(*gradient.shape[:-1], self.in_features)

    def _unfolded(self, start: int, end: int) -> torch.Tensor:
        """(blocks, I, W) bfloat16: the weights of outputs [start, end)."""
        layout, groups = self._layout, self.in_features // INT4_GROUP
        blocks = (end - start) // layout.width
        packed = self.packed[start:end].view(blocks, self.in_features, layout.width // 2)
        tile = torch.empty(blocks, self.in_features, layout.width, dtype=torch.bfloat16)
        tile[..., layout.low] = packed & (_INT4_LEVELS - 1)
        tile[..., layout.high] = packed >> 4
        scales = self.scales[:, start:end].view(groups, blocks, 1, layout.width, 2)
        # Contiguous: with the strides they are stored in, addcmul is ten times slower.
        scale, offset = scales.permute(4, 1, 0, 2, 3).contiguous().unbind(0)
        lowest = (offset.float() - _INT4_MIDDLE * scale.float()).to(torch.bfloat16)
        grouped = tile.view(blocks, groups, INT4_GROUP, layout.width)
        torch.addcmul(lowest, grouped, scale, out=grouped)
        return tile

    def dequantized(self) -> torch.Tensor:
        """(O, I) float32: the weights that it computes with, rounded to bfloat16."""
        tile = self._unfolded(0, self.packed.shape[0])
        whole = tile.transpose(1, 2).reshape(-1, self.in_features)
        return whole[: self.out_features].float()


def cancelling_copy(
    layer: Int8Linear | Int4Linear, num_rows: int, generator: torch.Generator
) -> tuple[Int8Linear | Int4Linear, torch.Tensor]:
    """A layer of the same shape and (num_rows, I) rows whose exact products are zero.

    What comes out is the order of the sums alone, unhidden by rounding. Weights come in
    equal pairs within a group, rows in opposite ones. All outputs of a packed block are
    computed alike, so a few blocks and the last, broken one will do.
    """
    outputs = min(layer.out_features, _TILE_COLUMNS + layer.out_features % _OUTPUTS_MULTIPLE)
    groups, odd = divmod(layer.in_features, INT4_GROUP)
    order = torch.stack([torch.randperm(INT4_GROUP, generator=generator) for _ in range(groups)])

    def paired(count: int, sign: int) -> torch.Tensor:
        half = torch.randn(count, groups, INT4_GROUP // 2, generator=generator)
        pairs = torch.cat([half, sign * half], dim=2).gather(2, order.expand(count, -1, -1))
        return functional.pad(pairs.reshape(count, -1), (0, odd))

    linear = torch.nn.Linear(layer.in_features, outputs, bias=False)
    linear.weight = _constant(paired(outputs, 1))
    return type(layer)(linear), paired(num_rows, -1).to(torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where torch puts 4-bit weights on this processor: (O / W, I, W / 2) bytes."""

    width: int
    """W: outputs that are interleaved."""
    low: slice
    """The columns of a block in the low halves of its bytes."""
    high: slice


@functools.cache
def packed_layout() -> PackedLayout:
    """Learn the order by packing numbered weights: it is undocumented and depends on the CPU.

    Raises:
        ModelUnsupported: an order of another kind than those known.
    """
    outputs, inputs = _OUTPUTS_MULTIPLE, INT4_GROUP
    numbers = torch.arange(outputs * inputs, dtype=torch.int32).view(outputs, inputs)
    low = torch.zeros(outputs * inputs // 2, dtype=torch.int64)
    high = torch.zeros_like(low)
    for shift in (0, 4, 8):  # 2048 numbers: three digits of four bits
        digits = (numbers >> shift) & (_INT4_LEVELS - 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1).flatten().long()
        low |= (packed & (_INT4_LEVELS - 1)) << shift
        high |= (packed >> 4) << shift
    for width in (64, 32, 16):
        half = width // 2
        blocks = numbers.long().view(outputs // width, width, inputs).transpose(1, 2)
        for columns in (
            (slice(0, half), slice(half, width)),
            (slice(0, width, 2), slice(1, width, 2)),
            (slice(1, width, 2), slice(0, width, 2)),
        ):
            expected = [blocks[..., part].flatten() for part in columns]
            if torch.equal(expected[0], low) and torch.equal(expected[1], high):
                return PackedLayout(width=width, low=columns[0], high=columns[1])
    raise ModelUnsupported(
        "torch packs 4-bit weights in an unknown order on this processor: use int8"
    )


def int8_bytes(in_features: int, out_features: int) -> int:
    """Memory of the weights of an `Int8Linear`, without its bias."""
    return out_features * (in_features + torch.bfloat16.itemsize)


def int4_bytes(in_features: int, out_features: int) -> int:
    """Memory of the weights of an `Int4Linear`, without its bias.

    Raises:
        ModelUnsupported: as `Int4Linear`.
    """
    _check_int4_width(in_features)
    padded = out_features + -out_features % _OUTPUTS_MULTIPLE
    groups = in_features // INT4_GROUP
    return padded * (in_features // 2 + 2 * torch.bfloat16.itemsize * groups)


def _check_int4_width(in_features: int) -> None:
    if in_features % INT4_GROUP:
        raise ModelUnsupported(
            f"int4 needs layers with a multiple of {INT4_GROUP} inputs, one has {in_features}: "
            "use int8"
        )


def _slabs(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weights in float32, some outputs at a time."""
    outputs = max(1, _SLAB_VALUES // weight.shape[1] // _OUTPUTS_MULTIPLE) * _OUTPUTS_MULTIPLE
    return (slab.float() for slab in torch.split(weight, outputs))


def _int8_slab(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (O, I) and scales (O,)."""
    scales = _bfloat16_above(weight.abs().amax(dim=1) / _INT8_MAX)
    values = (weight / scales.float().unsqueeze(1)).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return values.to(torch.int8), scales


def _int4_slab(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values and (I / G, O, 2) scales and offsets that span each group's range."""
    padding = -weight.shape[0] % _OUTPUTS_MULTIPLE
    grouped = functional.pad(weight, (0, 0, 0, padding)).view(
        -1, weight.shape[1] // INT4_GROUP, INT4_GROUP
    )
    lowest, highest = grouped.aminmax(dim=2)
    scales = _bfloat16_above((highest - lowest) / (_INT4_LEVELS - 1))
    offsets = (lowest + _INT4_MIDDLE * scales.float()).to(torch.bfloat16)
    values = (grouped - offsets.float().unsqueeze(2)) / scales.float().unsqueeze(2)
    values = values.round_().add_(_INT4_MIDDLE).clamp_(0, _INT4_LEVELS - 1)
    numbers = values.view(-1, weight.shape[1]).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed, torch.stack([scales, offsets], dim=-1).transpose(0, 1).contiguous()


def _bfloat16_above(values: torch.Tensor) -> torch.Tensor:
    """`values` as bfloat16, rounded up: weights must not fall outside the range. Never 0."""
    tiny = torch.finfo(torch.bfloat16).tiny
    rounded = values.clamp(min=tiny).to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < values, above, rounded)


def _constant(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _in_bfloat16(
    rows: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    bias: torch.nn.Parameter | None,
) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1]).to(torch.bfloat16)
    result = product(flat).to(rows.dtype)
    if bias is not None:
        result = result + bias
    return result.reshape(*rows.shape[:-1], result.shape[-1])
