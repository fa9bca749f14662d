"""A model that exists in memory only: random weights for tests, examples and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.base.errors import ModelUnsupported
from shoal.model.families import family_of
from shoal.model.rows import tensor_bytes
from shoal.model.source import StoredTensor


class MemorySource:
    """A config and its tensors (a transformers `state_dict`), handed in."""

    def __init__(
        self, config: Any, tensors: Mapping[str, torch.Tensor], *, tokenizer: Any = None
    ) -> None:
        family_of(config)
        self.config = config
        self._tensors = dict(tensors)
        if getattr(config, "tie_word_embeddings", False):
            self._tensors.pop("lm_head.weight", None)
        self._tokenizer = tokenizer

    @property
    def identity(self) -> Mapping[str, Any]:
        """The config's own difference from its defaults."""
        values: dict[str, Any] = self.config.to_diff_dict()
        return {k: v for k, v in values.items() if k not in ("transformers_version", "dtype")}

    @property
    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From the config."""
        value = getattr(self.config, "eos_token_id", None)
        if value is None:
            return ()
        return tuple(value) if isinstance(value, list) else (int(value),)

    def tensor_names(self) -> Sequence[str]:
        """All tensors, sorted."""
        return sorted(self._tensors)

    def stored(self, name: str) -> StoredTensor:
        """Shape and torch's name of the dtype."""
        tensor = self._tensors[name]
        return StoredTensor(shape=tuple(tensor.shape), dtype=str(tensor.dtype))

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in one piece."""
        yield tensor_bytes(self._tensors[name])

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """A part of the tensor's bytes."""
        return bytes(tensor_bytes(self._tensors[name])[start : start + count])

    def side_files(self) -> Mapping[str, bytes]:
        """None: the tokenizer, if any, is an object."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor."""
        return self._tensors[name].detach().clone()

    def tokenizer(self) -> Any:
        """The tokenizer that was handed in."""
        if self._tokenizer is None:
            raise ModelUnsupported("this model in memory was made without a tokenizer")
        return self._tokenizer
