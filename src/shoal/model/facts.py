"""What a model costs and how it can be served, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from transformers import AutoConfig

from shoal.model.families import (
    FAMILIES,
    Family,
    family_of,
    num_blocks,
    recurrent_blocks,
    session_tokens_max,
)
from shoal.model.kv_cache import block_windows
from shoal.model.rows import DTYPES
from shoal.model.span_model import block_bytes

Engine = Literal["batched", "per-session"]
Reach = Literal["any", "margin", "start"]
"""Where a sequence can be cut back to, or forked at: any length; with sliding windows, the
last ROLLBACK_TOKENS positions and 0 (any length while it is short); or only 0 and its own."""

ExactSupport = Literal["yes", "probe"]
"""Whether a server may be exact: calls that run alone just have to be repeated (yes), or
a start-up probe must find row tiles for calls that share passes, or experts."""

_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """One row of the support table."""

    architecture: str
    engine: Engine
    truncate: Reach
    fork: Reach
    exact: ExactSupport
    is_tested: bool
    """Golden tests compare it with transformers; others rely on the start-up probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One model: shapes, sizes, support."""

    support: Support
    num_blocks: int
    hidden_size: int
    vocabulary: int
    session_tokens_max: int
    context_tokens: int
    """The model's context by its config: longer where rotary tables would change on the way,
    see docs/decisions/0012-caches-and-positions.md."""
    block_bytes: dict[str, list[int]]
    """Weights of each block, by dtype."""
    kv_bytes_per_token: dict[str, list[int]]
    """KV cache of one position in each block, by dtype; 0 in recurrent blocks. A sliding
    block keeps only the end of a long session; many short ones fill it like any other."""

    def blocks_that_fit(self, memory_gib: float, dtype: str, cache_tokens: int) -> int:
        """How many blocks, from the first, fit with a KV cache of `cache_tokens` positions.

        The process itself (torch and its libraries, some 0.5 GiB) is not counted.
        """
        left = memory_gib * _GIB
        sizes = zip(self.block_bytes[dtype], self.kv_bytes_per_token[dtype], strict=True)
        for index, (weights, per_token) in enumerate(sizes):
            left -= weights + per_token * cache_tokens
            if left < 0:
                return index
        return self.num_blocks


def model_facts(config: Any) -> ModelFacts:
    """The facts of a transformers config.

    Raises:
        ModelUnsupported: it can't be served, and why.
    """
    family = family_of(config)
    support = _support(family, config)
    values = [kv_values(config, index) for index in range(num_blocks(config))]
    sessions_end = session_tokens_max(config)
    return ModelFacts(
        support=support,
        num_blocks=num_blocks(config),
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        session_tokens_max=sessions_end,
        context_tokens=getattr(config, "max_position_embeddings", None) or sessions_end,
        block_bytes={dtype: block_bytes(config, dtype) for dtype in DTYPES},
        kv_bytes_per_token={
            name: [count * dtype.itemsize for count in values] for name, dtype in DTYPES.items()
        },
    )


def support_table() -> list[Support]:
    """All tested architectures."""
    return [_support(row, AutoConfig.for_model(name)) for name, row in FAMILIES.items()]


def _support(family: Family, config: Any) -> Support:
    has_experts = _has_experts(config)
    reach = _reach(config)
    return Support(
        architecture=config.model_type,
        engine="batched" if family.packs else "per-session",
        truncate=reach,
        fork=reach,
        exact="probe" if family.packs or has_experts else "yes",
        is_tested=family.is_tested,
    )


def _reach(config: Any) -> Reach:
    if recurrent_blocks(config):
        return "start"
    return "any" if not any(block_windows(config)) else "margin"


def _has_experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def kv_values(config: Any, index: int) -> int:
    """Values that the KV cache of block `index` grows by per position."""
    if index in recurrent_blocks(config):
        return 0
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        # Latent attention: one compressed row for all heads, and its rotated part.
        return int(config.kv_lora_rank) + int(config.qk_rope_head_dim)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if config.model_type == "falcon":
        shared = getattr(config, "multi_query", False) and not config.new_decoder_architecture
        kv_heads = 1 if shared else heads
    return 2 * kv_heads * head_size
