"""A GGUF file seen as a transformers model: names translated, tensors dequantised on read."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.base.errors import ModelCorrupt, ModelUnsupported
from shoal.model.families import family_of
from shoal.model.gguf_config import gguf_config
from shoal.model.gguf_header import GgufTensor, read_gguf_header
from shoal.model.source import StoredTensor

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

_HASH_PIECE_BYTES: Final = 16 << 20

_EOT_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")


class GgufSource:
    """A GGUF file of a llama (mistral) or qwen2 model.

    Raises:
        ModelCorrupt: truncated or altered.
        ModelUnsupported: an architecture, an option or a quantisation we can't read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = read_gguf_header(path)
        self._architecture = str(self._header.metadata.get("general.architecture"))
        with path.open("rb") as file:
            self._view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        factors = self._header.tensors.get("rope_freqs.weight")
        self.config = gguf_config(
            path, self._header, None if factors is None else self._dequantised(factors)
        )
        family_of(self.config)
        self._gguf_names = {
            ours: name
            for name in self._header.tensors
            if (ours := _hf_name(path, name)) is not None
        }
        self._names = sorted(self._gguf_names)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The architecture's part of the metadata."""
        prefix = f"{self._architecture}."
        metadata = self._header.metadata
        kept = {k: v for k, v in metadata.items() if k.startswith(prefix)}
        return {"general.architecture": self._architecture, **kept}

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self._path,)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of text, end of turn and end of message, as far as the file names them."""
        found = [self._header.metadata.get(f"tokenizer.ggml.{key}") for key in _EOT_KEYS]
        return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))

    def tensor_names(self) -> Sequence[str]:
        """All tensors but derived tables, in transformers' naming, sorted."""
        return self._names

    def stored(self, name: str) -> StoredTensor:
        """Shape of the values and GGUF's name of the quantisation."""
        tensor = self._tensor(name)
        return StoredTensor(shape=tensor.shape, dtype=tensor.quantisation.name)

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The tensor as it lies in the file (quantised, not permuted)."""
        tensor = self._tensor(name)
        view = memoryview(self._view)[tensor.offset : tensor.offset + tensor.num_bytes]
        for start in range(0, tensor.num_bytes, _HASH_PIECE_BYTES):
            yield view[start : start + _HASH_PIECE_BYTES]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as float32, in transformers' order of rows."""
        values = self._dequantised(self._tensor(name))
        if self._architecture == "llama":
            if ".q_proj." in name:
                values = _unpermuted(values, self.config.num_attention_heads)
            elif ".k_proj." in name:
                values = _unpermuted(values, self.config.num_key_value_heads)
        return torch.from_numpy(np.ascontiguousarray(values))

    def tokenizer(self) -> Any:
        """transformers' conversion of the tokenizer in the metadata (no weights are read)."""
        if "tokenizer.ggml.model" not in self._header.metadata:
            raise ModelUnsupported(f"{self._path} holds no tokenizer")
        try:
            # Not AutoTokenizer: it parses the whole header twice in Python to learn the class
            # (3 s for a vocabulary of 49,152) and arrives at this one.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                self._path.parent, gguf_file=self._path.name, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelUnsupported(f"{self._path}: no usable tokenizer: {error}") from error
        if self._header.metadata.get("tokenizer.ggml.pre") == "smollm":
            # transformers' table lacks it; without it runs of spaces before a digit differ.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        return tokenizer

    def _tensor(self, name: str) -> GgufTensor:
        return self._header.tensors[self._gguf_names[name]]

    def _dequantised(self, tensor: GgufTensor) -> np.ndarray:
        raw = np.frombuffer(self._view, np.uint8, tensor.num_bytes, tensor.offset)
        if tensor.quantisation is GGMLQuantizationType.F32:
            # A copy: torch may write, the mapping may not, and the file may be replaced.
            return raw.view(np.float32).reshape(tensor.shape).copy()
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            values: np.ndarray = quants.dequantize(rows, tensor.quantisation)
        except NotImplementedError as error:
            raise ModelUnsupported(
                f"{self._path}: cannot dequantise {tensor.quantisation.name}"
            ) from error
        return values.reshape(tensor.shape).astype(np.float32, copy=False)


def _hf_name(path: Path, name: str) -> str | None:
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


def _unpermuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection back in transformers' order.

    llama.cpp rotates neighbouring pairs, transformers rotates halves; its converter moves
    row (head, half, i) to (head, i, half).
    """
    if values.shape[0] % (2 * num_heads):
        raise ModelCorrupt(f"a projection of {values.shape[0]} rows for {num_heads} heads")
    split = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
