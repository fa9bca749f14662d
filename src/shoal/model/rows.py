"""Hidden states between bytes and tensors, for the raw encodings.

An encoding is named like its dtype and holds rows of raw little-endian values. D is the
hidden size, S the number of rows.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from shoal.base.errors import BadInput, ConfigError

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Encodings and compute dtypes by name."""


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
    """All encodings, the one that is `dtype`'s own first."""
    return (dtype, *(name for name in DTYPES if name != dtype))


def rows_from_bytes(
    payload: bytes | bytearray | memoryview, encoding: str, count: int, hidden_size: int
) -> torch.Tensor:
    """(S, D) rows on the CPU in the encoding's dtype; shares memory with a writable payload.

    Raises:
        BadInput: unknown encoding, or not `count` rows.
    """
    dtype = DTYPES.get(encoding)
    if dtype is None:
        raise BadInput(f"unknown encoding {encoding!r} (known: {', '.join(DTYPES)})")
    view = memoryview(payload)
    expected = count * hidden_size * dtype.itemsize
    if count < 1 or view.nbytes != expected:
        raise BadInput(
            f"{count} rows of {hidden_size} x {encoding} are {expected} bytes, got {view.nbytes}"
        )
    # torch insists on writable memory; bytes objects cost one copy, network buffers none.
    buffer = bytearray(view) if view.readonly else view
    return torch.frombuffer(buffer, dtype=dtype).view(count, hidden_size)


def rows_to_bytes(rows: torch.Tensor, encoding: str) -> bytes:
    """(S, D) rows as bytes in `encoding`.

    Raises:
        BadInput: unknown encoding.
    """
    dtype = DTYPES.get(encoding)
    if dtype is None:
        raise BadInput(f"unknown encoding {encoding!r} (known: {', '.join(DTYPES)})")
    return bytes(tensor_bytes(rows.to(device="cpu", dtype=dtype)))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as they lie in memory, row by row; not copied if contiguous."""
    raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def all_finite(rows: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(rows).all())
