"""The transformers config that a GGUF header describes, for llama, mistral and qwen2.

What can't be expressed exactly is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from shoal.base.errors import ModelCorrupt, ModelUnsupported
from shoal.model.gguf_header import GgufHeader

ARCHITECTURES: Final = ("llama", "qwen2")
"""GGUF names; mistral models are stored as llama."""

_LLAMA3_ORIGINAL_TOKENS: Final = 8192
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
"""All published llama 3 models share these three; the file holds only the outcome."""


def gguf_config(path: Path, header: GgufHeader, rope_factors: np.ndarray | None) -> Any:
    """The config for `header`; `rope_factors` is its `rope_freqs.weight`, if it has one.

    Raises:
        ModelUnsupported: an architecture or an option that cannot be served.
        ModelCorrupt: a value that every such file has is missing.
    """
    return _Builder(path, header, rope_factors).build()


class _Builder:
    def __init__(self, path: Path, header: GgufHeader, rope_factors: np.ndarray | None) -> None:
        self._path = path
        self._header = header
        self._rope_factors = rope_factors
        self._arch = str(header.metadata.get("general.architecture"))
        if self._arch not in ARCHITECTURES:
            raise ModelUnsupported(
                f"{path}: GGUF architecture {self._arch!r} cannot be served "
                f"(supported: {', '.join(ARCHITECTURES)})"
            )

    def build(self) -> Any:
        heads = self._int("attention.head_count")
        hidden = self._int("embedding_length")
        head_dim = self._optional_int("attention.key_length") or hidden // heads
        self._refuse_odd_parts(head_dim)
        values: dict[str, Any] = {
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": self._num_blocks(),
            "num_attention_heads": heads,
            "num_key_value_heads": self._optional_int("attention.head_count_kv") or heads,
            "max_position_embeddings": self._int("context_length"),
            "rms_norm_eps": _short_float(self._need("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self._header.tensors,
            "bos_token_id": self._token("bos_token_id"),
            "eos_token_id": self._token("eos_token_id"),
            "pad_token_id": None,
        }
        try:
            return self._of_family(values, head_dim)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise self._unsupported(f"values that transformers rejects: {error}") from error

    def _of_family(self, values: dict[str, Any], head_dim: int) -> Any:
        window = self._optional_int("attention.sliding_window")
        if self._arch == "qwen2":
            if head_dim * values["num_attention_heads"] != values["hidden_size"]:
                raise self._unsupported(f"heads of {head_dim} do not add up to hidden_size")
            if window:
                raise self._unsupported("sliding windows in qwen2")
            return Qwen2Config(**values)
        values["head_dim"] = head_dim
        has_bias = "blk.0.attn_q.bias" in self._header.tensors
        if window:
            if has_bias:
                raise self._unsupported("a sliding window together with attention biases")
            return MistralConfig(**values, sliding_window=window)
        return LlamaConfig(**values, attention_bias=has_bias)

    def _refuse_odd_parts(self, head_dim: int) -> None:
        if self._optional_int("expert_count"):
            raise self._unsupported("mixtures of experts in GGUF")
        if (self._optional_int("attention.value_length") or head_dim) != head_dim:
            raise self._unsupported("keys and values of different size")
        if (self._optional_int("rope.dimension_count") or head_dim) != head_dim:
            raise self._unsupported("rotation of a part of each head")
        for name in self._header.tensors:
            if name.endswith(("ffn_up.bias", "ffn_gate.bias", "ffn_down.bias")):
                raise self._unsupported(f"biases in the feed-forward part ({name})")

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = _short_float(self._header.metadata.get(f"{self._arch}.rope.freq_base", 10000.0))
        kind = self._header.metadata.get(f"{self._arch}.rope.scaling.type", "none")
        if self._rope_factors is not None:
            if kind != "none":
                raise self._unsupported(f"rope factors together with rope scaling {kind!r}")
            return self._llama3_rope(theta, head_dim, self._rope_factors)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            factor = _short_float(self._need("rope.scaling.factor"))
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        raise self._unsupported(f"rope scaling {kind!r} from GGUF (use the safetensors files)")

    def _llama3_rope(self, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
        """The llama3 parameters whose factors are those in the file, or a refusal."""
        factor = float(factors.max())
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_TOKENS,
        }
        expected = llama3_rope_factors(rope, head_dim)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise self._unsupported("rope factors that are not llama3's (use the safetensors)")
        return rope

    def _num_blocks(self) -> int:
        count = self._int("block_count")
        if any(
            (f"blk.{index}.attn_norm.weight" in self._header.tensors) != is_there
            for index, is_there in ((count - 1, True), (count, False))
        ):
            raise ModelCorrupt(f"{self._path} says {count} blocks but holds others")
        return count

    def _token(self, key: str) -> int | None:
        value = self._header.metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) else None

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._header.tensors.get(name)
        if tensor is None:
            raise ModelCorrupt(f"{self._path} has no tensor {name}")
        return tensor.shape

    def _need(self, key: str) -> Any:
        value = self._header.metadata.get(f"{self._arch}.{key}")
        if value is None:
            raise ModelCorrupt(f"{self._path} lacks the metadata {self._arch}.{key}")
        return value

    def _int(self, key: str) -> int:
        value = self._need(key)
        if not isinstance(value, int) or value < 1:
            raise self._unsupported(f"{self._arch}.{key} = {value!r}")
        return value

    def _optional_int(self, key: str) -> int | None:
        value = self._header.metadata.get(f"{self._arch}.{key}")
        return None if value is None else self._int(key)

    def _unsupported(self, what: str) -> ModelUnsupported:
        return ModelUnsupported(f"{self._path}: not supported: {what}")


def llama3_rope_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by under llama3 scaling, `head_dim / 2` values.

    Frequencies of long wavelength are divided by `factor`, short ones by 1, those between
    by a blend. Source: transformers' `_compute_llama3_parameters`.
    """
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / rope["factor"] + blend), dtype=np.float32)


def _short_float(value: Any) -> float:
    """A float32 from the file as the shortest decimal that it stands for (1e-05, not 9.99e-06)."""
    return float(str(np.float32(value)))
