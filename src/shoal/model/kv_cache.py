"""The KV cache of one sequence: contiguous per block, grown in steps, cut by a number.

It stands in for transformers' own `Cache`: blocks call `update`, masks ask for lengths.
Rows become part of the sequence only by `commit`; a call that fails leaves them beyond the
committed length, where the next call overwrites them. That makes rollback and truncation
free. Sliding blocks show attention only the window and keep just a margin beyond it, see
`block_rows`: going back further means starting again. Recurrent blocks keep one state of
fixed size instead: it can be put back to before the last call, but not cut to an earlier
position.
Shapes: K KV heads, S new tokens, H head size; keys and values are (1, K, positions, H).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from shoal.base.errors import ModelUnsupported
from shoal.base.spans import Span
from shoal.model.block_rows import PAGE_TOKENS, BlockRows, first_visible
from shoal.model.families import RECURRENT_KINDS

__all__ = ["PAGE_TOKENS", "SequenceCache", "block_windows"]


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
        self._length = length
        self._window = window
        self.is_sliding = window is not None
        self.rows = BlockRows(window)

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write S new rows after the committed ones; returns what attention may see."""
        start = self._length.value
        self.rows.write(start, key_states, value_states, start)
        self.is_initialized = True
        return self.rows.read(self._first_visible(start), start + key_states.shape[-2])

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

    def can_continue_at(self, length: int) -> bool:
        """Whether a sequence cut to `length` positions could go on."""
        return self.rows.can_continue_at(length)

    def restart(self) -> None:
        """Forget everything."""
        self.rows = BlockRows(self._window)

    def copy_from(self, other: _BlockCache) -> None:
        """Take over a copy of the other's rows below our own committed length."""
        self.rows = other.rows.copied(self._length.value)

    def _first_visible(self, start: int) -> int:
        return first_visible(start, self._window)


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

    def restart(self) -> None:
        """Forget everything."""
        self._before = None
        self._restore(_RecurrentState()._copied())

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
        ours = [self.layers[index] for index in range(span.start, span.end)]
        self._states = [layer for layer in ours if isinstance(layer, _RecurrentState)]
        self._rows = [layer for layer in ours if isinstance(layer, _BlockCache)]

    @property
    def length(self) -> int:
        """Committed positions."""
        return self._length.value

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values; recurrent states are not counted."""
        return sum(layer.rows.num_bytes for layer in self._rows)

    def begin(self) -> None:
        """A call starts; what an earlier one left without a commit is forgotten."""
        for state in self._states:
            state.begin()

    def rewind(self, block: int) -> None:
        """Undo what the call under way did to the state of one recurrent block."""
        self.layers[block].begin()

    def commit(self, count: int) -> None:
        """Make `count` rows, written since the last commit, part of the sequence."""
        self._length.value += count
        for state in self._states:
            state.commit()

    def truncate(self, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left.

        That is 0 when a recurrent block of the span would have to go back, or when a
        sliding one dropped what attention at `length` would see.
        """
        kept = self._reachable(length)
        if not kept:
            for layer in self.layers:
                layer.restart()
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
        if wanted < self.length and self._states:
            return 0
        return wanted if all(layer.can_continue_at(wanted) for layer in self._rows) else 0
