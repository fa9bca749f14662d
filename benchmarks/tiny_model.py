"""A small random model on disk, for benchmarks that must run anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = 95
"""Printable ones of ASCII."""


def save_tiny(folder: Path) -> None:
    """A random llama with 6 blocks, 256 wide, whose tokens are printable characters."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=CHARACTERS + 1, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, CHARACTERS + 1)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token per printable character; the rest of the vocabulary are names that never match."""
    vocabulary = {chr(32 + index): index for index in range(CHARACTERS)} | {"<unk>": CHARACTERS}
    vocabulary |= {f"<{index}>": index for index in range(CHARACTERS + 1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
