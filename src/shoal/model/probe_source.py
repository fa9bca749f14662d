"""A model whose tensors are made up: to measure how fast its blocks run before any is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from shoal.base.errors import ModelUnsupported
from shoal.model.source import ModelSource, StoredTensor

_SCALE: Final = 0.02
"""Standard deviation, as transformers initialises: hidden states stay finite."""


class ProbeSource:
    """Config, names and shapes of `source`, and seeded random values. Nothing is read of it."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.config = source.config

    @property
    def identity(self) -> Mapping[str, Any]:
        """The source's."""
        return self._source.identity

    @property
    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The source's."""
        return self._source.eos_token_ids

    def tensor_names(self) -> Sequence[str]:
        """The source's."""
        return self._source.tensor_names()

    def stored(self, name: str) -> StoredTensor:
        """The source's."""
        return self._source.stored(name)

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """Raise ModelUnsupported: made-up values are not for others."""
        raise ModelUnsupported(f"{name} was made up")

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """Raise ModelUnsupported, as `stored_bytes`."""
        raise ModelUnsupported(f"{name} was made up")

    def side_files(self) -> Mapping[str, bytes]:
        """None."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """Values around 0, the same each time."""
        shape = self._source.stored(name).shape
        generator = torch.Generator().manual_seed(len(name))
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, _SCALE, generator=generator)

    def tokenizer(self) -> Any:
        """Raise ModelUnsupported: there is no text."""
        raise ModelUnsupported("made-up weights have no tokenizer")
