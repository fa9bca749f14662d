"""How hidden states look as bytes.

Every encoding maps a row (one position, `hidden_size` values) to the same number of
bytes, independent of its neighbours: an entry can be cut or trimmed at any row.
"""

from __future__ import annotations

from typing import Final

from shoal.base.errors import BadInput

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per value of the raw encodings, which are named like their dtype."""


def row_bytes(encoding: str, hidden_size: int) -> int:
    """Bytes of one row.

    Raises:
        BadInput: no such encoding.
    """
    item = ITEM_BYTES.get(encoding)
    if item is None:
        raise BadInput(f"unknown encoding {encoding!r} (known: {', '.join(ITEM_BYTES)})")
    return item * hidden_size


def check_payload(encoding: str, hidden_size: int, rows: int, payload_bytes: int) -> None:
    """Refuse a payload that is not `rows` rows.

    Raises:
        BadInput: wrong encoding or size.
    """
    expected = rows * row_bytes(encoding, hidden_size)
    if payload_bytes != expected:
        raise BadInput(
            f"{rows} rows of {hidden_size} x {encoding} are {expected} bytes, got {payload_bytes}"
        )
