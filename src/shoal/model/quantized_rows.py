"""Hidden states in about half of bfloat16's bytes: the encoding `int8-block`.

Per row: D int8 values, then one float16 scale for each block of 64 values (the last block
may be shorter). A value is its int8 times its block's scale; the scale is the block's
largest magnitude / 127, rounded up. Rows are encoded one by one, so a row's bytes depend on nothing
but itself. Blockwise scales follow Dettmers et al., 8-bit optimizers via block-wise
quantization (2021), which Petals uses on its wire.
Shapes: S rows, D hidden size, B blocks of a row.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from shoal.base.errors import BadInput

INT8_BLOCK: Final = "int8-block"
"""The encoding's name."""

BLOCK_VALUES: Final = 64
"""Values that share a scale: 3 % more bytes than none, and an outlier spoils only 63 others."""

_LARGEST: Final = 127
_SCALE_BYTES: Final = torch.float16.itemsize


def int8_row_bytes(hidden_size: int) -> int:
    """Bytes of one row."""
    return hidden_size + _num_blocks(hidden_size) * _SCALE_BYTES


def int8_to_bytes(rows: torch.Tensor) -> bytes:
    """(S, D) rows, any dtype and device, as bytes.

    Raises:
        BadInput: values that no float16 scale reaches, or that are not finite.
    """
    rows = rows.detach().to(device="cpu", dtype=torch.float32)
    count, hidden_size = rows.shape
    padding = -hidden_size % BLOCK_VALUES
    blocks = functional.pad(rows, (0, padding)).view(count, -1, BLOCK_VALUES)
    scales = _float16_above(blocks.abs().amax(dim=2) / _LARGEST)
    if not bool(torch.isfinite(scales).all()):
        raise BadInput("values are too large for the encoding int8-block: use a raw one")
    # A scale of 0 is a block of zeros.
    steps = scales.float().masked_fill(scales == 0, torch.inf).unsqueeze(2)
    values = (blocks / steps).round_().to(torch.int8)
    values = values.view(count, -1)[:, :hidden_size]
    joined = torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
    return joined.contiguous().numpy().tobytes()


def int8_from_bytes(buffer: bytearray | memoryview, count: int, hidden_size: int) -> torch.Tensor:
    """(S, D) float32 rows of `int8_to_bytes`' bytes, whose size was checked."""
    joined = torch.frombuffer(buffer, dtype=torch.uint8).view(count, -1)
    values = joined[:, :hidden_size].view(torch.int8).float()
    # Copied: an odd hidden size leaves the scales unaligned.
    scales = joined[:, hidden_size:].flatten().clone().view(torch.float16).float().view(count, -1)
    per_value = scales.repeat_interleave(BLOCK_VALUES, dim=1)[:, :hidden_size]
    return values.mul_(per_value)


def _float16_above(values: torch.Tensor) -> torch.Tensor:
    """`values` as float16, rounded up: nothing then lies beyond 127 steps."""
    rounded = values.to(torch.float16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < values, above, rounded)


def _num_blocks(hidden_size: int) -> int:
    return -(-hidden_size // BLOCK_VALUES)
