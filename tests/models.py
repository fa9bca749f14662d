"""Tiny random models for tests: configs, weights, files of every format, backends.

Weights are drawn from a seed; nothing is downloaded. All models share one vocabulary of 96.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from shoal.base.spans import Span
from shoal.model.gguf_config import llama3_rope_factors
from shoal.model.memory_source import MemorySource
from shoal.model.torch_backend import BackendConfig, TorchBackend, load_backend

VOCABULARY = 96
NUM_BLOCKS = 7

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ALTERNATING = [
    "full_attention" if index % 2 else "sliding_attention" for index in range(NUM_BLOCKS)
]

FAMILIES = (
    "llama",
    "llama_tied",
    "llama3_rope",
    "mistral",
    "mistral_full",
    "qwen2",
    "qwen2_sliding",
)


def tiny_config(family: str = "llama") -> Any:
    """A config of one of `FAMILIES`, or `wide`."""
    match family:
        case "llama":
            return LlamaConfig(**_SIZES, tie_word_embeddings=False)
        case "llama_tied":
            return LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True)
        case "llama3_rope":
            return LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, head_dim=16)
        case "wide":
            # Every row a multiple of 32: what quantised GGUF types need.
            return LlamaConfig(**_SIZES | {"hidden_size": 96, "intermediate_size": 64}, head_dim=16)
        case "mistral":
            return MistralConfig(**_SIZES, head_dim=8, sliding_window=9)
        case "mistral_full":
            return MistralConfig(**_SIZES, head_dim=16, sliding_window=None)
        case "qwen2":
            return Qwen2Config(**_SIZES, tie_word_embeddings=True)
        case "qwen2_sliding":
            return Qwen2Config(
                **_SIZES, use_sliding_window=True, sliding_window=9, layer_types=_ALTERNATING
            )
        case _:
            raise ValueError(family)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 7) -> Any:
    """The whole model with seeded random weights, as transformers builds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Wider than the default: near-ties between tokens would hide errors.
                scale = 0.15 if weight.dim() > 1 else 0.1
                weight.normal_(1.0 if "norm" in name else 0.0, scale)
                # Not model.to(dtype): that would round the rotary tables as well.
                weight.data = weight.data.to(dtype)
    return model.eval()


def tiny_source(family: str = "llama") -> MemorySource:
    """The same model as a source in memory."""
    model = tiny_model(family)
    return MemorySource(model.config, model.state_dict())


def tiny_torch_backend(
    span: Span | None = None,
    *,
    family: str = "llama",
    dtype: str = "float32",
    cache_tokens: int = 4096,
) -> TorchBackend:
    """A torch backend over `span` (default: all blocks) of a tiny model, one thread."""
    config = BackendConfig(model="tiny-" + family, dtype=dtype, cache_tokens=cache_tokens)
    return load_backend(tiny_source(family), span or Span(0, NUM_BLOCKS), config)


def save_safetensors(directory: Path, family: str = "llama", *, sharded: bool = False) -> Any:
    """Save the tiny model as transformers does; returns the model."""
    model = tiny_model(family)
    model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
    return model


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(
    path: Path,
    family: str = "llama",
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, int | str] | None = None,
) -> Any:
    """Save the tiny model as llama.cpp's converter would; returns the model."""
    model = tiny_model(family)
    config = model.config
    arch = "qwen2" if family.startswith("qwen2") else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or 8
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_rope_factors(_LLAMA3, head_dim))
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _as_gguf(name, weight.numpy(), config, permuted=arch == "llama")
        kind = quantisation if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, index, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_PARTS[part]}.{kind}"


def _as_gguf(name: str, values: np.ndarray, config: Any, *, permuted: bool) -> np.ndarray:
    if not permuted or not (".q_proj." in name or ".k_proj." in name):
        return values
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
