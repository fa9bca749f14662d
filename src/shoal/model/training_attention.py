"""Attention for training: whole sequences, no cache, differentiable.

`TrainingStep` takes the place of `packed_attention.PackedStep`: transformers' own blocks see
packed rows, and each sequence attends to itself from position 0.
Shapes: T rows of the pass, S of a sequence, B sequences of equal length, N query heads,
K KV heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from shoal.base.errors import InternalError
from shoal.model.packed_attention import Extras, PackedStep, attend_by_hand, is_plain, repeated

BY_HAND_MAX: Final = 256
"""Positions up to which bfloat16 on a CPU attends by hand. Measured, forward and back, 9 heads
of 64: 128 positions 1.1 ms instead of 3.9, 512 14.6 instead of 24.7. Longer ones would hold too
much memory: the scores are quadratic."""


class TrainingStep(PackedStep):
    """One block's pass over whole sequences that lie one after the other."""

    def __init__(self, windows: Sequence[int | None], lengths: Sequence[int]) -> None:
        super().__init__(windows, ())
        self._lengths = tuple(lengths)
        self._states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Take (1, K, T, H) keys and values; attention follows."""
        self._block = layer_idx
        self._states = (key_states, value_states)
        return key_states, value_states

    def attend(self, query: torch.Tensor, value_size: int, extras: Extras) -> torch.Tensor:
        """(1, T, N, H) attention of (1, N, T, H) queries."""
        if self._states is None:
            raise InternalError("attention came before its keys")
        keys, values = self._states
        self._states = None
        if extras.latent is not None:
            keys, values = extras.latent.expanded(keys, values)
        if len(set(self._lengths)) == 1:
            batch = len(self._lengths)
            together = (_batched(query, batch), _batched(keys, batch), _batched(values, batch))
            parts = [self._attend(*together, extras)]
        else:
            lengths = list(self._lengths)
            cut = zip(*(torch.split(x, lengths, dim=2) for x in (query, keys, values)), strict=True)
            parts = [self._attend(one, its_keys, its_values, extras)
                     for one, its_keys, its_values in cut]  # fmt: skip
        flat = [part.transpose(1, 2).flatten(0, 1)[..., :value_size] for part in parts]
        return torch.cat(flat).unsqueeze(0)

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, extras: Extras
    ) -> torch.Tensor:
        """(B, N, S, H) of sequences of equal length."""
        groups = query.shape[1] // keys.shape[1]
        keys, values = repeated(keys, groups), repeated(values, groups)
        count, window = query.shape[2], self._windows[self._block]
        is_whole = window is None or window >= count
        is_short = query.dtype == torch.bfloat16 and not query.is_cuda and count <= BY_HAND_MAX
        if is_short or not is_plain(extras):
            mask = _mask(count, window, query)
            return attend_by_hand(query, keys, values, mask, extras)
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if is_whole else _mask(count, window, query),
            is_causal=is_whole,
            scale=extras.scale,
        )


def _batched(states: torch.Tensor, batch: int) -> torch.Tensor:
    """(B, N, S, H) from (1, N, B * S, H)."""
    _, heads, total, size = states.shape
    return states.reshape(heads, batch, total // batch, size).transpose(0, 1)


def _mask(count: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(S, S) of True where a row sees a key."""
    places = torch.arange(count, device=like.device)
    ahead = places.unsqueeze(1) - places
    mask = ahead >= 0
    return mask if window is None else mask & (ahead < window)
