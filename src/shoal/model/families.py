"""Which architectures can be served, where each keeps its parts, and what each refuses.

The loader is generic: a model that names its parts like llama and does nothing to hidden
states outside its blocks needs no row here at all (it runs as *untested*, guarded by the
start-up probes of spans and heads). A row says where a family differs, and that golden
tests compare it with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.base.errors import ModelUnsupported

RECURRENT_KINDS: Final = ("linear_attention", "conv")
"""Blocks whose state is of fixed size: it can't be cut back to an earlier position."""

_ATTENTION_KINDS: Final = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a family differs from llama.

    Paths are dotted and relative to transformers' base model (`XxxModel`).
    """

    core: str = ""
    """The module that runs the blocks, where it isn't the base model itself. The paths
    below are relative to it."""
    blocks: str = "layers"
    norm: str = "norm"
    embedding: str = "embed_tokens"
    embedding_norm: str = ""
    """A norm on embeddings; the client runs it."""
    positions: str = ""
    """Learned positions, added to embeddings by the client."""
    embedding_multiplier: str = ""
    """The attribute of the core with a factor on embeddings; the client multiplies."""
    returns_tuples: bool = False
    """Blocks return (hidden states, ...) instead of hidden states."""
    logit_factor: str = ""
    """The config's factor on scores."""
    logit_divisor: str = ""
    """The config's divisor of scores."""
    logit_softcap: str = ""
    """The config's soft cap: cap * tanh(scores / cap)."""
    packs: bool = False
    """Rows of many sequences can go through its blocks in one pass."""
    is_recurrent: bool = False
    """Some blocks keep a state of fixed size: sequences can't be cut at any length."""
    is_tested: bool = True
    """Golden tests compare it with transformers."""


FAMILIES: dict[str, Family] = {
    "llama": Family(packs=True),
    "mistral": Family(packs=True),
    "qwen2": Family(packs=True),
    "qwen3": Family(packs=True),
    "qwen3_moe": Family(packs=True),
    "qwen3_next": Family(is_recurrent=True),
    "gemma": Family(packs=True),
    "gemma2": Family(logit_softcap="final_logit_softcapping", packs=True),
    "gemma3_text": Family(logit_softcap="final_logit_softcapping", packs=True),
    "mixtral": Family(packs=True),
    "phi3": Family(packs=True),
    "gpt_oss": Family(packs=True),
    "gpt_neox": Family(norm="final_layer_norm", embedding="embed_in", packs=True),
    "deepseek_v3": Family(packs=True),
    "olmo3": Family(packs=True),
    "smollm3": Family(packs=True),
    "glm4_moe": Family(packs=True),
    "granite": Family(
        embedding_multiplier="embedding_multiplier", logit_divisor="logits_scaling", packs=True
    ),
    "cohere2": Family(logit_factor="logit_scale", packs=True),
    "stablelm": Family(packs=True),
    "starcoder2": Family(packs=True),
    "bloom": Family(
        blocks="h",
        norm="ln_f",
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        returns_tuples=True,
    ),
    "falcon": Family(blocks="h", norm="ln_f", embedding="word_embeddings", returns_tuples=True),
    "gpt2": Family(blocks="h", norm="ln_f", embedding="wte", positions="wpe", packs=True),
    "opt": Family(core="decoder", norm="final_layer_norm", positions="embed_positions", packs=True),
    "mamba2": Family(norm="norm_f", embedding="embeddings", is_recurrent=True),
}

_PER_LAYER_INPUTS: Final = (
    "its blocks read the token ids (per-layer embeddings), which only the client has"
)
_NESTED: Final = "its text model is nested inside a multimodal one: give a text-only checkpoint"

_REFUSALS: dict[str, Callable[[Any], str | None]] = {
    "gemma3n": lambda _: _PER_LAYER_INPUTS,
    "gemma3n_text": lambda _: _PER_LAYER_INPUTS,
    "gemma4": lambda _: _NESTED,
    "gemma4_text": lambda config: (
        _PER_LAYER_INPUTS if getattr(config, "hidden_size_per_layer_input", 0) else None
    ),
    "llama4": lambda _: _NESTED,
    "opt": lambda config: (
        None
        if config.word_embed_proj_dim == config.hidden_size
        else "projections around the blocks (word_embed_proj_dim differs from hidden_size)"
    ),
}


def family_of(config: Any) -> Family:
    """How to serve a transformers config: its row, or llama's names as an untested guess.

    Raises:
        ModelUnsupported: transformers has no causal language model of this kind, or we
            can't serve it, and why.
    """
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelUnsupported(
            f"architecture {model_type!r} cannot be served: transformers has no causal language "
            f"model of that name (tested: {', '.join(FAMILIES)})"
        )
    reason = refusal_of(model_type, config)
    if reason is not None:
        raise ModelUnsupported(f"architecture {model_type!r} cannot be served: {reason}")
    return FAMILIES.get(model_type) or Family(is_tested=False)


def refusal_of(model_type: str, config: Any) -> str | None:
    """Why a model of this config can't be served; None when nothing speaks against it."""
    refuse = _REFUSALS.get(model_type)
    if refuse is not None and (reason := refuse(config)) is not None:
        return reason
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        return _NESTED
    if getattr(config, "quantization_config", None) is not None:
        return (
            "its weights are stored quantised (quantization_config), which is not read yet: "
            "give the bf16 checkpoint"
        )
    if getattr(config, "add_cross_attention", False):
        return "its blocks attend to an encoder"
    kinds = set(block_kinds(config)) - {*_ATTENTION_KINDS, *RECURRENT_KINDS}
    if kinds:
        return f"blocks of kind {', '.join(sorted(kinds))} are not supported yet"
    return None


def block_kinds(config: Any) -> tuple[str, ...]:
    """What each block remembers, in transformers' words (`full_attention`, ...)."""
    kinds, _ = get_layer_types_and_kwargs(config)
    return tuple(kinds)


def recurrent_blocks(config: Any) -> frozenset[int]:
    """Blocks with a state of fixed size in place of keys and values."""
    return frozenset(i for i, kind in enumerate(block_kinds(config)) if kind in RECURRENT_KINDS)


def num_blocks(config: Any) -> int:
    """Blocks of the whole model."""
    return int(config.num_hidden_layers)


def session_tokens_max(config: Any) -> int:
    """The longest session that the model itself supports.

    Rotary tables that look at the longest position of a call (longrope, dynamic) would give
    a row other values in other company or on replay. They stay fixed at what they are up to
    the length the model was first trained on, and sessions end there; see decision 12. A
    longrope whose short and long factors are equal has one table only, and no such end.
    """
    longest = getattr(config, "max_position_embeddings", None)
    limits = [int(longest)] if longest else [_UNLIMITED]
    rope = getattr(config, "rope_parameters", None) or {}
    for table in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(table.get("rope_type", ""))
        if (kind == "longrope" and not _has_one_table(table)) or "dynamic" in kind:
            original = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if original:
                limits.append(int(original))
    return min(limits)


def _has_one_table(longrope: dict[str, Any]) -> bool:
    """Whether whatever a longrope says of short sessions it says of long ones too."""
    return all(
        longrope.get(key.replace("short_", "long_")) == value
        for key, value in longrope.items()
        if key.startswith("short_")
    )


_UNLIMITED: Final = 1 << 20
"""Where the config names no longest position (alibi, recurrent models): a million."""
