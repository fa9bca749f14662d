"""Where each tensor lies in a safetensors file.

The library checks a file's header when it opens it; it doesn't tell the offsets, which are
needed to read tensors without mapping the file. Format: 8 bytes little-endian length of
the header, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from shoal.base.errors import ModelCorrupt

_HEADER_BYTES_MAX = 100_000_000
"""The library's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor of a file."""

    offset: int
    """In bytes from the start of the file."""
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    """The format's own name, for example `BF16`."""


def read_places(path: Path) -> dict[str, TensorPlace]:
    """All tensors of a file that the library has opened (and so checked) before.

    Raises:
        ModelCorrupt: not a safetensors file (any more).
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_BYTES_MAX:
                raise ModelCorrupt(f"{path} has a header of {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: TensorPlace(
                offset=8 + length + int(entry["data_offsets"][0]),
                num_bytes=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                shape=tuple(entry["shape"]),
                dtype=str(entry["dtype"]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise ModelCorrupt(
            f"{path} is truncated or altered ({error}): fetch the model again"
        ) from error
