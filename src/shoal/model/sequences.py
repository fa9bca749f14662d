"""The open sequences of a torch backend: one cache each, whatever kind of cache it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from shoal.base.adapters import AdapterId
from shoal.base.backend import SequenceId
from shoal.base.errors import BadInput, InternalError
from shoal.base.spans import Span


class Cache(Protocol):
    """What both kinds of cache can do."""

    @property
    def length(self) -> int:
        """Positions held."""

    def truncate(self, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left."""


C = TypeVar("C", bound=Cache)


class Sequences(Generic[C]):
    """The half of BlockBackend that keeps caches; see there."""

    def __init__(
        self, served: Span, new_cache: Callable[[Span], C], fork: Callable[[C, int], C]
    ) -> None:
        self._served = served
        self._new_cache = new_cache
        self._fork = fork
        self._sequences: dict[SequenceId, C] = {}
        self._adapters: dict[SequenceId, AdapterId] = {}
        """Of those sequences that have one."""

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence over `span`, with an adapter or none."""
        self._check_new(sequence)
        if not len(span) or not self._served.covers(span):
            raise BadInput(f"blocks {span} are not a part of {self._served}")
        self._sequences[sequence] = self._new_cache(span)
        if adapter is not None:
            self._adapters[sequence] = adapter

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence's cache."""
        self._sequences.pop(sequence, None)
        self._adapters.pop(sequence, None)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left.

        Sliding blocks go back by a margin, or to the start; recurrent ones only to the start.
        """
        return self._cache(sequence).truncate(length)

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Open `child` as a copy of the parent's first positions."""
        self._check_new(child)
        with torch.inference_mode():
            copy = self._fork(self._cache(parent), length)
        self._sequences[child] = copy
        if parent in self._adapters:
            self._adapters[child] = self._adapters[parent]
        return copy.length

    def _check_new(self, sequence: SequenceId) -> None:
        if sequence in self._sequences:
            raise InternalError(f"sequence {sequence} is open already")

    def _cache(self, sequence: SequenceId) -> C:
        cache = self._sequences.get(sequence)
        if cache is None:
            raise InternalError(f"sequence {sequence} is not open")
        return cache
