"""Sizes as people write them: 50GB, 800MB, 1.5GiB, 4096."""

from __future__ import annotations

import re
from typing import Final

from shoal.base.errors import ConfigError

_UNITS: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str, option: str) -> int:
    """Bytes; `option` is the flag that the text was given to.

    Raises:
        ConfigError: no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{option} {text!r}: write a size such as 800MB or 50GB")
    return int(float(match[1]) * _UNITS[match[2]])


def size_text(num_bytes: float) -> str:
    """For example `7.1 MB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
