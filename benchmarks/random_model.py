"""Random models of real shapes, made in memory: figures depend on shapes, not on values."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shoal.base.spans import Span
from shoal.model.memory_source import MemorySource

SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "small": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip


def random_source(
    shape: dict[str, Any], blocks: int | None = None, span: Span | None = None
) -> MemorySource:
    """A bfloat16 llama of this shape, or only what a server of `span` reads of it."""
    blocks = blocks or int(shape["num_hidden_layers"])
    config = LlamaConfig(**shape | {"num_hidden_layers": blocks}, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in model.state_dict().items():
        number = re.search(r"layers\.(\d+)\.", name)
        if span is not None and (number is None or int(number[1]) not in span):
            continue
        if weight.dim() == 1:
            tensors[name] = torch.ones(weight.shape, dtype=torch.bfloat16)
            continue
        values = torch.empty(weight.shape, dtype=torch.bfloat16)
        values.uniform_(-1.0, 1.0, generator=generator)
        tensors[name] = values.mul_(1.7 / weight.shape[1] ** 0.5)
    return MemorySource(config, tensors)
