"""Random models of real shapes, in memory or on disk: figures depend on shapes, not on values."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from shoal.base.spans import Span
from shoal.model.known import default_cache_dir
from shoal.model.memory_source import MemorySource
from shoal.model.source import ModelSource, open_source
from tiny_model import save_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "304m": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 5632,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "110m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
    },
    "hop": {  # wide and short: more weights than caches hold, in few blocks
        "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 5632,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "small": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip

FORMAT = 1
"""Raise it when what is saved changes: old folders are then left alone."""


def random_source(
    shape: dict[str, Any], blocks: int | None = None, span: Span | None = None
) -> MemorySource:
    """A bfloat16 llama of this shape, or only what a server of `span` reads of it."""
    blocks = blocks or int(shape["num_hidden_layers"])
    config = LlamaConfig(
        **shape | {"num_hidden_layers": blocks}, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return MemorySource(config, _random_tensors(config, span))


def _random_tensors(config: LlamaConfig, span: Span | None) -> dict[str, torch.Tensor]:
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
    return tensors


def saved_folder(shape: str) -> Path:
    """The whole model in the cache folder, weights and tokenizer; written the first time."""
    parent = default_cache_dir(os.environ) / "benchmarks"
    folder = parent / f"{shape}-v{FORMAT}"
    if not folder.exists():
        print(f"writing a random model of shape {shape} to {folder}", file=sys.stderr)
        parent.mkdir(parents=True, exist_ok=True)
        started = Path(tempfile.mkdtemp(prefix=f"{shape}-", dir=parent))
        try:
            source = random_source(SHAPES[shape])
            source.config.save_pretrained(started)
            tensors = {name: source.read(name) for name in source.tensor_names()}
            save_file(tensors, started / "model.safetensors", metadata={"format": "pt"})
            save_tokenizer(started, int(SHAPES[shape]["vocab_size"]))
            started.rename(folder)
        finally:
            shutil.rmtree(started, ignore_errors=True)
    return folder


def saved_source(shape: str) -> ModelSource:
    """The same random model from disk."""
    return open_source(saved_folder(shape), default_cache_dir(os.environ))
