"""The KV cache of one sequence: contiguous per block, grown in steps, cut by a number.

It stands in for transformers' own `Cache`: blocks call `update`, masks ask for lengths.
Rows become part of the sequence only by `commit`; a call that fails leaves them beyond the
committed length, where the next call overwrites them. That makes rollback and truncation
free. Sliding blocks keep their whole past too (so any truncation is possible) and show
attention only the window. Recurrent blocks keep one state of fixed size instead: it can be
put back to before the last call, but not cut to an earlier position. Shapes: K KV heads, T
cached + new tokens, S new tokens, H head size; keys and values are (1, K, T, H).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from shoal.base.errors import ModelUnsupported
from shoal.base.spans import Span
from shoal.model.families import RECURRENT_KINDS

PAGE_TOKENS: Final = 32
"""Buffers are whole pages: the unit that servers account in."""

_SPARE_SHARE: Final = 4
"""Grow by at least a quarter: copying stays O(1) per token at 25 % spare memory."""


def block_windows(config: Any) -> tuple[int | None, ...]:
    """Each block's sliding window in tokens, None where it sees everything or is recurrent.

    Raises:
        ModelUnsupported: a block with another kind of state.
    """
    kinds, options = get_layer_types_and_kwargs(config)
    windows: list[int | None] = []
    for kind, option in zip(kinds, options, strict=True):
        if kind == "full_attention" or kind in RECURRENT_KINDS:
            windows.append(None)
        elif kind == "sliding_attention":
            windows.append(int(option["sliding_window"]))
        else:
            raise ModelUnsupported(f"blocks of kind {kind!r} are not supported yet")
    return tuple(windows)


class _Length:
    """Committed positions, shared by a sequence's blocks (no reference cycle)."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class _BlockCache(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one block; no memory before the first update."""

    def __init__(self, length: _Length, window: int | None) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False
        self._length = length
        self._window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._grow(key_states, value_states, key_states.shape[-2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write S new rows after the committed ones; returns what attention may see."""
        start = self._length.value
        end = start + key_states.shape[-2]
        if not self.is_initialized or self.keys.shape[-2] < end:
            self._grow(key_states, value_states, end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        first = self._first_visible(start)
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys attention will see, and the position of the first."""
        start = self._length.value
        first = self._first_visible(start)
        return start + query_length - first, first

    def get_seq_length(self) -> int:
        """Committed positions."""
        return self._length.value

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def copy_from(self, other: _BlockCache) -> None:
        """Take over a copy of the other's rows below our own committed length."""
        if other.is_initialized and self._length.value:
            end = self._length.value
            self._grow(other.keys, other.values, end)
            self.keys[:, :, :end] = other.keys[:, :, :end]
            self.values[:, :, :end] = other.values[:, :, :end]

    def _first_visible(self, start: int) -> int:
        return 0 if self._window is None else max(start - self._window + 1, 0)

    def _grow(self, key_like: torch.Tensor, value_like: torch.Tensor, tokens: int) -> None:
        wanted = tokens
        if self.is_initialized:
            wanted = max(tokens, self.keys.shape[-2] + self.keys.shape[-2] // _SPARE_SHARE)
        capacity = -(-wanted // PAGE_TOKENS) * PAGE_TOKENS
        self.keys = self._resized(self.keys, key_like, capacity)
        self.values = self._resized(self.values, value_like, capacity)
        self.is_initialized = True

    def _resized(self, old: torch.Tensor | None, like: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, head_size = like.shape
        buffer = like.new_empty((batch, heads, capacity, head_size))
        if old is not None:
            kept = self._length.value
            buffer[:, :, :kept] = old[:, :, :kept]
        return buffer


class _RecurrentState(LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped
    """The state of one recurrent block. Calls change it in place, so a copy is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._before: tuple[dict[int, Any], dict[int, Any], dict[int, bool]] | None = None

    def begin(self) -> None:
        """A call starts: what an earlier call left without a commit is undone."""
        if self._before is not None:
            self._restore(self._before)
        self._before = self._copied()

    def commit(self) -> None:
        """Keep what the last call made of the state."""
        self._before = None

    def copy_from(self, other: _RecurrentState) -> None:
        """Take over a copy of the other's committed state."""
        self._restore(other._before or other._copied())
        self._restore(self._copied())

    def _copied(self) -> tuple[dict[int, Any], dict[int, Any], dict[int, bool]]:
        return (
            {i: None if s is None else s.clone() for i, s in self.conv_states.items()},
            {i: None if s is None else s.clone() for i, s in self.recurrent_states.items()},
            dict(self.has_previous_state),
        )

    def _restore(self, state: tuple[dict[int, Any], dict[int, Any], dict[int, bool]]) -> None:
        self.conv_states, self.recurrent_states, self.has_previous_state = (
            dict(state[0]),
            dict(state[1]),
            dict(state[2]),
        )
        for index, conv in self.conv_states.items():
            self.is_conv_states_initialized[index] = conv is not None
            if conv is not None:
                self.conv_kernel_size[index] = conv.shape[-1]
                self.dtype, self.device = conv.dtype, conv.device
        for index, recurrent in self.recurrent_states.items():
            self.is_recurrent_states_initialized[index] = recurrent is not None


class SequenceCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache of one sequence over `span`; other blocks only answer with lengths."""

    def __init__(
        self,
        windows: tuple[int | None, ...],
        span: Span,
        length: int = 0,
        recurrent: frozenset[int] = frozenset(),
    ) -> None:
        self._length = _Length(length)
        self._windows = windows
        self._recurrent = recurrent
        self.span = span
        super().__init__(
            layers=[
                _RecurrentState() if index in recurrent else _BlockCache(self._length, window)
                for index, window in enumerate(windows)
            ]
        )
        self._states = [self.layers[i] for i in sorted(recurrent) if i in span]

    @property
    def length(self) -> int:
        """Committed positions."""
        return self._length.value

    @property
    def can_truncate(self) -> bool:
        """Whether `truncate` reaches any length; else only 0 and the present one."""
        return not self._states

    def begin(self) -> None:
        """A call starts; what an earlier one left without a commit is forgotten."""
        for state in self._states:
            state.begin()

    def commit(self, count: int) -> None:
        """Make `count` rows, written since the last commit, part of the sequence."""
        self._length.value += count
        for state in self._states:
            state.commit()

    def truncate(self, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left.

        That is 0 when a recurrent block of the span would have to go back.
        """
        kept = self._reachable(length)
        if kept < self.length and self._states:
            for index in sorted(self._recurrent):
                self.layers[index] = _RecurrentState()
            self._states = [self.layers[i] for i in sorted(self._recurrent) if i in self.span]
        self._length.value = kept
        return kept

    def forked(self, length: int) -> SequenceCache:
        """A copy of the first `length` positions: fewer if there are fewer, or see `truncate`."""
        kept = self._reachable(length)
        child = SequenceCache(self._windows, self.span, kept, self._recurrent)
        if kept:
            for ours, theirs in zip(child.layers, self.layers, strict=True):
                ours.copy_from(theirs)
        return child

    def _reachable(self, length: int) -> int:
        wanted = min(self.length, max(length, 0))
        return wanted if wanted == self.length or self.can_truncate else 0
