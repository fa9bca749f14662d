"""A model's sizes for a ring: what its blocks, caches and head take as nodes load them."""

from __future__ import annotations

from typing import Any

import torch

from shoal.model.facts import kv_values
from shoal.model.parts import Parts, meta_model
from shoal.model.quantize import Quantization
from shoal.model.rows import torch_dtype
from shoal.model.span_model import block_bytes
from shoal.model.tiled_experts import has_experts
from shoal.plan.ring import RingModel


def ring_sizes(config: Any, dtype: str, quantize: Quantization, cache_tokens: int) -> RingModel:
    """Sizes from a transformers config alone; no weights are read.

    Raises:
        ConfigError: an unknown dtype.
        ModelUnsupported: an architecture that can't be cut.
    """
    value_bytes = torch_dtype(dtype).itemsize
    weights = block_bytes(config, dtype, quantize)
    parts = Parts(meta_model(config, torch_dtype(dtype)))
    largest = max(weight.numel() for weight in parts.blocks.parameters())
    return RingModel(
        weight_bytes=tuple(weights),
        token_bytes=tuple(value_bytes * kv_values(config, block) for block in range(len(weights))),
        head_bytes=value_bytes * parts.head.weight.numel(),
        row_bytes=value_bytes * int(config.hidden_size),
        cache_tokens=cache_tokens,
        spare_bytes=torch.float32.itemsize * largest,
        keeps_blocks=not has_experts(parts.blocks),
    )
