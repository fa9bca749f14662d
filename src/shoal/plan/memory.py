"""How much memory weights, caches and logs take: exact bytes, per block and per session.

A session costs a server the keys and values of each block it runs (`CacheShape`), and
the log of the hidden states that it sent on (`log_bytes`). Both grow with the session.
Not here: what a backend really allocates; it is measured (`shoal.model.measure`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError

WINDOW_MARGIN_TOKENS: Final = 0
"""Positions that a sliding block keeps beyond its window unless told otherwise: none is
what the architecture needs; an engine that can be rolled back keeps more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one block keeps of a session. Start with `mha`, `gqa`, `mqa` or `mla`."""

    values_per_token: int
    """Numbers kept per position."""
    value_bytes: int = 2
    """Bytes of each: 2 for float16 and bfloat16."""
    window: int | None = None
    """Only this many last positions are kept; None: all."""
    margin_tokens: int = WINDOW_MARGIN_TOKENS
    """Positions kept beyond the window, to roll back to."""
    state_bytes: int = 0
    """Kept once per session whatever its length (recurrent blocks)."""

    def __post_init__(self) -> None:
        if min(self.values_per_token, self.margin_tokens, self.state_bytes) < 0:
            raise ConfigError("a cache's sizes must be at least 0")
        if self.value_bytes < 1 or (self.window is not None and self.window < 1):
            raise ConfigError("a cache's window and bytes per value must be at least 1")

    def session_bytes(self, tokens: int, page_tokens: int = 1) -> int:
        """Bytes of a session of `tokens` positions, in whole pages of `page_tokens`."""
        kept = tokens
        if self.window is not None:
            kept = min(tokens, self.window + self.margin_tokens)
        pages = -(-kept // page_tokens)
        return pages * page_tokens * self.values_per_token * self.value_bytes + self.state_bytes


def mha(num_heads: int, head_size: int, value_bytes: int = 2, **more: int) -> CacheShape:
    """Multi-head attention: a key and a value for each head."""
    return gqa(num_heads, head_size, value_bytes, **more)


def gqa(num_kv_heads: int, head_size: int, value_bytes: int = 2, **more: int) -> CacheShape:
    """Grouped-query attention: a key and a value for each KV head. `more`: window, ..."""
    return CacheShape(
        values_per_token=2 * num_kv_heads * head_size, value_bytes=value_bytes, **more
    )


def mqa(head_size: int, value_bytes: int = 2, **more: int) -> CacheShape:
    """Multi-query attention: one key and one value for all heads."""
    return gqa(1, head_size, value_bytes, **more)


def mla(rank: int, rotated_size: int, value_bytes: int = 2) -> CacheShape:
    """Multi-head latent attention: one compressed row and its rotated part for all heads."""
    return CacheShape(values_per_token=rank + rotated_size, value_bytes=value_bytes)


def log_bytes(tokens: int, row_bytes: int) -> int:
    """Bytes of the log of a hop that sent `tokens` rows of hidden states."""
    return tokens * row_bytes


def quantised_bytes(num_params: int, bits: float, overhead: float = 1.0) -> int:
    """Bytes of `num_params` weights of `bits` bits each, times `overhead`.

    BPRR takes 4.25 bits (NF4 with its constants) and 1.01 for what is not quantised.
    """
    return round(num_params * bits / 8 * overhead)
