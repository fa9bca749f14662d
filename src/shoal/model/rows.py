"""Hidden states between bytes and tensors.

A raw encoding is named like its dtype and holds rows of little-endian values; the
compressed one is in `quantized_rows.py`. D is the hidden size, S the number of rows.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.model.quantized_rows import INT8_BLOCK, int8_from_bytes, int8_row_bytes, int8_to_bytes

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Compute dtypes, and the raw encodings, by name."""


def torch_dtype(name: str) -> torch.dtype:
    """The compute dtype called `name`.

    Raises:
        ConfigError: not one we run.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return dtype


def encodings_for(dtype: str) -> tuple[str, ...]:
    """All encodings, the one that is `dtype`'s own first, the lossy one last."""
    return (dtype, *(name for name in DTYPES if name != dtype), INT8_BLOCK)


def rows_from_bytes(
    payload: bytes | bytearray | memoryview, encoding: str, count: int, hidden_size: int
) -> torch.Tensor:
    """(S, D) rows on the CPU, in a raw encoding's dtype or float32.

    Raw rows share memory with a writable payload.

    Raises:
        BadInput: unknown encoding, or not `count` rows.
    """
    dtype = DTYPES.get(encoding)
    if dtype is None and encoding != INT8_BLOCK:
        raise _unknown(encoding)
    view = memoryview(payload)
    row_bytes = int8_row_bytes(hidden_size) if dtype is None else hidden_size * dtype.itemsize
    if count < 1 or view.nbytes != count * row_bytes:
        raise BadInput(
            f"{count} rows of {hidden_size} x {encoding} are {count * row_bytes} bytes, "
            f"got {view.nbytes}"
        )
    # torch insists on writable memory; bytes objects cost one copy, network buffers none.
    buffer = bytearray(view) if view.readonly else view
    if dtype is None:
        return int8_from_bytes(buffer, count, hidden_size)
    return torch.frombuffer(buffer, dtype=dtype).view(count, hidden_size)


def rows_to_bytes(rows: torch.Tensor, encoding: str) -> bytes:
    """(S, D) rows as bytes in `encoding`.

    Raises:
        BadInput: unknown encoding, or values that it can't hold.
    """
    if encoding == INT8_BLOCK:
        return int8_to_bytes(rows)
    dtype = DTYPES.get(encoding)
    if dtype is None:
        raise _unknown(encoding)
    raw = rows.to(device="cpu", dtype=dtype)
    if dtype == torch.float16 and not all_finite(raw):
        raise BadInput("values are too large for the encoding float16: use bfloat16")
    return bytes(tensor_bytes(raw))


def _unknown(encoding: str) -> BadInput:
    known = ", ".join((*DTYPES, INT8_BLOCK))
    return BadInput(f"unknown encoding {encoding!r} (known: {known})")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as they lie in memory, row by row; not copied if contiguous."""
    raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def all_finite(rows: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(rows).all())
