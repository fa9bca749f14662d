"""Run and fine-tune large language models together on machines that are each too small.

The names below are the public API; everything else may change. They are loaded on first
use, so that `import shoal` is quick and never imports torch. Start with ARCHITECTURE.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.base.backend import BlockBackend
    from shoal.base.errors import ShoalError
    from shoal.base.ids import PeerId, SessionId
    from shoal.base.spans import Span
    from shoal.net.address import Address, parse_address
    from shoal.net.transport import Transport

__version__ = "0.1.0"

__all__ = [
    "Address",
    "BlockBackend",
    "PeerId",
    "SessionId",
    "ShoalError",
    "Span",
    "Transport",
    "__version__",
    "parse_address",
]

_HOMES = {
    "Address": "shoal.net.address",
    "BlockBackend": "shoal.base.backend",
    "PeerId": "shoal.base.ids",
    "SessionId": "shoal.base.ids",
    "ShoalError": "shoal.base.errors",
    "Span": "shoal.base.spans",
    "Transport": "shoal.net.transport",
    "parse_address": "shoal.net.address",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
