"""A GGUF file seen as a transformers model: names translated, tensors dequantised on read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from shoal.model.families import family_of
from shoal.model.gguf_config import gguf_config
from shoal.model.gguf_header import GgufTensor, metadata_only, read_gguf_header
from shoal.model.gguf_tensors import (
    ROPE_FACTORS,
    dequantised,
    gguf_end_tokens,
    gguf_tokenizer,
    hf_name,
    in_model_order,
)
from shoal.model.source import StoredTensor

_HASH_PIECE_BYTES: Final = 16 << 20


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
        factors = self._header.tensors.get(ROPE_FACTORS)
        self._rope_factors = None if factors is None else self._dequantised(factors)
        self.config = gguf_config(path, self._header, self._rope_factors)
        family_of(self.config)
        self._gguf_names = {
            ours: name for name in self._header.tensors if (ours := hf_name(path, name)) is not None
        }
        self._names = sorted(self._gguf_names)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The architecture's part of the metadata, and rope factors where the file has them."""
        prefix = f"{self._architecture}."
        metadata = self._header.metadata
        kept = {k: v for k, v in metadata.items() if k.startswith(prefix)}
        if self._rope_factors is not None:
            # They decide what is computed, and are no tensor of the model.
            kept[ROPE_FACTORS] = self._rope_factors.tolist()
        return {"general.architecture": self._architecture, **kept}

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self._path,)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of text, end of turn and end of message, as far as the file names them."""
        return gguf_end_tokens(self._header.metadata)

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

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """A part of the tensor as it lies in the file."""
        tensor = self._tensor(name)
        end = min(start + count, tensor.num_bytes)
        return self._view[tensor.offset + min(start, end) : tensor.offset + end]

    def side_files(self) -> Mapping[str, bytes]:
        """The metadata, which holds the tokenizer."""
        if "tokenizer.ggml.model" not in self._header.metadata:
            return {}
        return {"tokenizer.gguf": metadata_only(self._path, self._header)}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as float32, in transformers' order of rows."""
        values = self._dequantised(self._tensor(name))
        return torch.from_numpy(in_model_order(values, name, self._architecture, self.config))

    def tokenizer(self) -> Any:
        """transformers' conversion of the tokenizer in the metadata (no weights are read)."""
        return gguf_tokenizer(self._path, self._header.metadata)

    def _tensor(self, name: str) -> GgufTensor:
        return self._header.tensors[self._gguf_names[name]]

    def _dequantised(self, tensor: GgufTensor) -> np.ndarray:
        raw = np.frombuffer(self._view, np.uint8, tensor.num_bytes, tensor.offset)
        return dequantised(str(self._path), raw, tensor.shape, tensor.quantisation)
