"""What the tensors and the tokenizer of a GGUF file are in transformers' terms.

Names are translated, values dequantised, rows of projections put back in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.base.errors import ModelCorrupt, ModelUnsupported

ROPE_FACTORS: Final = "rope_freqs.weight"
"""The one table beside the weights that says more than the metadata."""

_WHOLE_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED: Final = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|rope_factors_.*")
"""Tables derived from the config; the first is checked against it."""

_EOT_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")


def dequantised(
    where: str, raw: np.ndarray, shape: tuple[int, ...], quantisation: GGMLQuantizationType
) -> np.ndarray:
    """The float32 values of a tensor's bytes (uint8); `where` is for messages.

    Raises:
        ModelUnsupported: a quantisation that can't be read.
    """
    if quantisation is GGMLQuantizationType.F32:
        # A copy: torch may write, the mapping may not, and the file may be replaced.
        return raw.view(np.float32).reshape(shape).copy()
    rows = raw.reshape(*shape[:-1], -1)
    try:
        values: np.ndarray = quants.dequantize(rows, quantisation)
    except NotImplementedError as error:
        raise ModelUnsupported(f"{where}: cannot dequantise {quantisation.name}") from error
    return values.reshape(shape).astype(np.float32, copy=False)


def in_model_order(values: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    """A tensor's values with their rows in transformers' order."""
    if architecture == "llama":
        if ".q_proj." in name:
            values = _unpermuted(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = _unpermuted(values, config.num_key_value_heads)
    return np.ascontiguousarray(values)


def gguf_end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, end of turn and end of message, as far as the metadata names them."""
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in _EOT_KEYS]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """transformers' conversion of the tokenizer in the metadata of the file at `path`.

    Raises:
        ModelUnsupported: there is none, or none that can be used.
    """
    if "tokenizer.ggml.model" not in metadata:
        raise ModelUnsupported(f"{path} holds no tokenizer")
    try:
        # Not AutoTokenizer: it parses the whole header twice in Python to learn the class
        # (3 s for a vocabulary of 49,152) and arrives at this one.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnsupported(f"{path}: no usable tokenizer: {error}") from error
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        # transformers' table lacks it; without it runs of spaces before a digit differ.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def hf_name(path: Path, name: str) -> str | None:
    """transformers' name of a GGUF tensor; None for a derived table."""
    whole = _WHOLE_NAMES.get(name)
    if whole is not None:
        return whole
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is not None and match[2] in _BLOCK_PARTS:
        return f"model.layers.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}"
    if _IGNORED.match(name):
        return None
    raise ModelUnsupported(f"{path}: tensor {name!r} has no place in this architecture")


def gguf_name(name: str) -> str:
    """The inverse of `hf_name`.

    Raises:
        ModelUnsupported: no tensor that a GGUF file of ours can have.
    """
    for theirs, ours in _WHOLE_NAMES.items():
        if ours == name:
            return theirs
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is not None:
        for theirs, ours in _BLOCK_PARTS.items():
            if ours == match[2]:
                return f"blk.{match[1]}.{theirs}.{match[3]}"
    raise ModelUnsupported(f"tensor {name!r} has no place in a GGUF model")


def _unpermuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection back in transformers' order.

    llama.cpp rotates neighbouring pairs, transformers rotates halves; its converter moves
    row (head, half, i) to (head, i, half).
    """
    if values.shape[0] % (2 * num_heads):
        raise ModelCorrupt(f"a projection of {values.shape[0]} rows for {num_heads} heads")
    split = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
