"""What the tests of quantised weights share."""

from __future__ import annotations

from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.model.memory_source import MemorySource

ERROR_MAX: Final = {"int8": 0.01, "int4": 0.1}
"""Relative rms error of one layer on random weights; 0.5 % and 6.4 % were measured."""


def wide_source() -> MemorySource:
    """A random llama with 4 blocks whose widths suit int4: 128 and 192."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return MemorySource(model.config, model.state_dict())


def rms_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the expected values'."""
    return float((result.float() - expected).norm() / expected.norm())
