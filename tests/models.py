"""Tiny random models for tests: configs, weights, files of every format, backends.

Weights are drawn from a seed; nothing is downloaded. All models share one vocabulary of 96.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from shoal.base.spans import Span
from shoal.model.batched_backend import BatchedBackend
from shoal.model.gguf_config import llama3_rope_factors
from shoal.model.memory_source import MemorySource
from shoal.model.torch_backend import BackendConfig, ExactChoice, TorchBackend, load_backend

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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.5, 7.0],
    "original_max_position_embeddings": 64,
}
_ALTERNATING = [
    "full_attention" if index % 2 else "sliding_attention" for index in range(NUM_BLOCKS)
]

PLAIN_FAMILIES = (
    "llama",
    "llama_tied",
    "llama3_rope",
    "mistral",
    "mistral_full",
    "qwen2",
    "qwen2_sliding",
)


_SMALL: dict[str, Any] = _SIZES | {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_HEAD: dict[str, Any] = {"head_dim": 8}
_SLIDING: dict[str, Any] = {
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT: dict[str, Any] = {
    key: _SMALL[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK: dict[str, Any] = _EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", _SMALL | _HEAD),
    "qwen3_moe": ("qwen3_moe", _SMALL | _HEAD | _EXPERTS | {"num_experts": 4}),
    "qwen3_next": (
        "qwen3_next",
        _SMALL
        | _HEAD
        | _EXPERTS
        | {
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "gemma": ("gemma", _SMALL | _HEAD),
    "gemma2": (
        "gemma2",
        _SMALL | _HEAD | _SLIDING | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        _SMALL | _HEAD | _SLIDING | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "mixtral": ("mixtral", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", _SMALL),
    "phi3_sliding": ("phi3", _SMALL | {"sliding_window": 9}),
    "phi3_longrope": (
        "phi3",
        _SMALL | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "llama_dynamic": (
        "llama",
        _SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama_yarn": ("llama", _SMALL | {"rope_parameters": _YARN}),
    "gpt_oss": (
        "gpt_oss",
        _SMALL | _HEAD | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "deepseek_v3": (
        "deepseek_v3",
        _SMALL
        | _DEEPSEEK
        | {
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
    "olmo3": ("olmo3", _SMALL | _SLIDING),
    "smollm3": ("smollm3", _SMALL | {"no_rope_layers": [1, 1, 1, 0]}),
    "glm4_moe": ("glm4_moe", _SMALL | _HEAD | _DEEPSEEK | {"use_qk_norm": True}),
    "granite": (
        "granite",
        _SMALL
        | {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
    ),
    "cohere2": ("cohere2", _SMALL | _SLIDING | {"logit_scale": 0.25}),
    "stablelm": ("stablelm", _SMALL),
    "starcoder2": ("starcoder2", _SMALL | {"sliding_window": 9}),
    "bloom": ("bloom", _GPT | {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": (
        "falcon",
        _GPT | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "falcon_new": (
        "falcon",
        _GPT
        | {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "falcon_alibi": (
        "falcon",
        _GPT
        | {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "gpt2": ("gpt2", _GPT | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "opt": (
        "opt",
        _GPT
        | {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "mamba2": (
        "mamba2",
        _GPT
        | {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
}
OTHER_FAMILIES = tuple(_CONFIGS)
FAMILIES = (*PLAIN_FAMILIES, *OTHER_FAMILIES)
"""Names for `tiny_config`; several may be variants of one architecture."""


def tiny_config(family: str = "llama", blocks: int | None = None) -> Any:
    """A config of one of `FAMILIES`, or `wide`; of `OTHER_FAMILIES` with that many blocks."""
    if family in _CONFIGS:
        model_type, values = copy.deepcopy(_CONFIGS[family])
        if blocks is not None:
            values = {key: value for key, value in values.items() if key != "n_layer"}
            values["num_hidden_layers"] = blocks
            if "layer_types" in values:
                values["layer_types"] = (values["layer_types"] * blocks)[:blocks]
        return AutoConfig.for_model(model_type, **values)
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


def tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    blocks: int | None = None,
) -> Any:
    """The whole model with seeded random weights, as transformers builds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, blocks))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Wider than the default: near-ties between tokens would hide errors.
                scale = 0.15 if weight.dim() > 1 else 0.1
                is_norm = "norm" in name or ".ln_" in name
                weight.normal_(1.0 if is_norm else 0.0, scale)
                # Not model.to(dtype): that would round the rotary tables as well.
                weight.data = weight.data.to(dtype)
    return model.eval()


def tiny_source(family: str = "llama", blocks: int | None = None) -> MemorySource:
    """The same model as a source in memory."""
    model = tiny_model(family, blocks=blocks)
    return MemorySource(model.config, model.state_dict())


def tiny_torch_backend(
    span: Span | None = None,
    *,
    family: str = "llama",
    dtype: str = "float32",
    cache_tokens: int = 4096,
) -> TorchBackend:
    """A per-session backend over `span` (default: all blocks) of a tiny model, one thread."""
    config = BackendConfig(
        model="tiny-" + family, dtype=dtype, cache_tokens=cache_tokens, engine="per-session"
    )
    backend = load_backend(tiny_source(family), span or Span(0, NUM_BLOCKS), config)
    assert isinstance(backend, TorchBackend)
    return backend


def tiny_batched_backend(
    span: Span | None = None,
    *,
    family: str = "llama",
    dtype: str = "float32",
    exact: ExactChoice = "never",
) -> BatchedBackend:
    """A batched backend over `span` (default: all blocks) of a tiny model, one thread."""
    config = BackendConfig(model="tiny-" + family, dtype=dtype, engine="batched", exact=exact)
    backend = load_backend(tiny_source(family), span or Span(0, NUM_BLOCKS), config)
    assert isinstance(backend, BatchedBackend)
    return backend


def save_safetensors(
    directory: Path,
    family: str = "llama",
    *,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Save the tiny model as transformers does; returns the model."""
    model = tiny_model(family, dtype)
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
