"""Attention for rows of many sequences that share one pass.

A pass packs the new rows of all its pieces into one batch of size 1. Linear layers, norms
and MLPs of transformers' own blocks see just rows. Only attention must know whose rows they
are: `PackedStep` stands in for transformers' cache and stores each piece's keys and values
with its sequence, and the attention function registered here then attends piece by piece.
Sliding windows, softcaps (gemma2) and sinks (gpt_oss) are handled here too.

A piece attends in one of two ways, and which one depends on the piece alone: *as a chunk*
(one call for all its rows, under a causal mask) or *by position* (one call per row, which
sees just its past, as decode does). Company never changes the calls that are made.
Shapes: S rows of a piece, T rows of the pass, L keys, N query heads, K KV heads, H head size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from shoal.base.errors import InternalError
from shoal.model.block_rows import first_visible
from shoal.model.latent_attention import LatentAttention, latent_of
from shoal.model.packed_cache import PackedCache

NAME: Final = "shoal_packed"
"""What the attention function is called in transformers' registry."""

_current = threading.local()
"""The step under way on this thread: transformers hands attention functions no such thing,
and what does reach them (keys, keyword arguments) differs between architectures."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Consecutive rows of one sequence in a pass."""

    cache: PackedCache
    start: int
    """Position of the first row."""
    count: int
    """Rows, padding included."""
    by_position: bool
    """Attend row by row, so that the bits don't depend on how rows were grouped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an architecture adds to plain attention."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    """(N,) logits of a key that everybody sees and that has no value."""
    latent: LatentAttention | None
    """Keys and values are cached compressed."""


class _NoLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Answers questions about lengths, which only masks ask; masks are ours."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to prepare."""

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called: the step stores keys and values."""
        raise InternalError("rows of a packed pass went past the step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing was cached."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As if nothing was cached."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class PackedStep(Cache):  # type: ignore[misc]  # transformers is untyped
    """One pass: whose rows these are. Handed to transformers in place of its cache.

    The pieces' rows lie one after the other; rows beyond the last piece are padding.
    """

    def __init__(self, windows: Sequence[int | None], pieces: Sequence[Piece]) -> None:
        super().__init__(layers=[_NoLayer(window is not None) for window in windows])
        self._windows = windows
        self._pieces = pieces
        self._block = -1
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Store (1, K, T, H) keys and values with their sequences; attention follows."""
        self._block = layer_idx
        at = 0
        for piece in self._pieces:
            end = at + piece.count
            piece.cache.write(
                layer_idx, piece.start, key_states[:, :, at:end], value_states[:, :, at:end]
            )
            at = end
        return key_states, value_states

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this step's rows go through blocks on this thread."""
        _current.step = self
        try:
            yield
        finally:
            _current.step = None

    def attend(self, query: torch.Tensor, value_size: int, extras: Extras) -> torch.Tensor:
        """(1, T, N, H) attention of (1, N, T, H) queries; zeros for padding rows."""
        _, heads, total, _ = query.shape
        output = query.new_zeros((1, total, heads, value_size))
        at = 0
        for index, piece in enumerate(self._pieces):
            end = at + piece.count
            rows = query[:, :, at:end]
            if piece.by_position or piece.count == 1:
                for offset in range(piece.count):
                    one = self._attend_one(piece, offset, rows[:, :, offset : offset + 1], extras)
                    output[0, at + offset] = one
            else:
                chunk = self._attend_chunk(index, rows, extras)
                output[:, at:end] = chunk[..., :value_size].transpose(1, 2)
            at = end
        return output

    def _attend_one(
        self, piece: Piece, offset: int, query: torch.Tensor, extras: Extras
    ) -> torch.Tensor:
        """(N, H): one row sees its own past, so there is no mask."""
        position = piece.start + offset
        window = self._windows[self._block]
        first = first_visible(position, window)
        keys, values = piece.cache.read(self._block, first, position + 1)
        if extras.latent is not None:
            return extras.latent.attend_one(query, keys, values, extras.scale)
        heads, kv_heads = query.shape[1], keys.shape[1]
        # The query heads that share a KV head become rows: keys are read once for all.
        grouped = query.reshape(1, kv_heads, heads // kv_heads, query.shape[3])
        if is_plain(extras):
            result = functional.scaled_dot_product_attention(
                grouped, keys, values, scale=extras.scale
            )
        else:
            result = attend_by_hand(grouped, keys, values, None, extras)
        return result.reshape(heads, values.shape[3])

    def _attend_chunk(self, index: int, query: torch.Tensor, extras: Extras) -> torch.Tensor:
        """(1, N, S, H): all rows of a piece at once."""
        piece = self._pieces[index]
        window = self._windows[self._block]
        first = first_visible(piece.start, window)
        keys, values = piece.cache.read(self._block, first, piece.start + piece.count)
        if extras.latent is not None:
            keys, values = extras.latent.expanded(keys, values)
        groups = query.shape[1] // keys.shape[1]
        is_lower_left = piece.start == 0 and (window is None or window >= piece.count)
        mask = None if is_lower_left and is_plain(extras) else self._mask(index, window, query)
        if not is_plain(extras):
            keys, values = repeated(keys, groups), repeated(values, groups)
            return attend_by_hand(query, keys, values, mask, extras)
        if query.is_cuda and mask is not None:
            # The fast kernels of CUDA take grouped heads only without a mask.
            keys, values = repeated(keys, groups), repeated(values, groups)
            groups = 1
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=extras.scale,
            enable_gqa=groups > 1,
        )

    def _mask(self, index: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(S, L) of True where a row of the piece sees a key; kept for the other blocks."""
        mask = self._masks.get((index, window))
        if mask is None:
            piece = self._pieces[index]
            first = first_visible(piece.start, window)
            end = piece.start + piece.count
            rows = torch.arange(piece.start, end, device=like.device).unsqueeze(1)
            keys = torch.arange(first, end, device=like.device).unsqueeze(0)
            mask = keys <= rows
            if window is not None:
                mask &= keys > rows - window
            self._masks[index, window] = mask
        return mask


def use_packed_attention(config: Any) -> None:
    """Make the model that holds `config` attend through the step under way."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    config._attn_implementation = NAME


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    _key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; keys and values are with their sequences already."""
    step: PackedStep | None = getattr(_current, "step", None)
    if step is None:
        raise InternalError("packed attention outside a packed pass")
    scale = options.get("scaling")
    extras = Extras(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        latent=latent_of(module),
    )
    return step.attend(query, value.shape[-1], extras), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def is_plain(extras: Extras) -> bool:
    """Whether torch's kernels know it."""
    return extras.softcap is None and extras.sinks is None


def repeated(states: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, N, L, H) from (1, K, L, H)."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def attend_by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    extras: Extras,
) -> torch.Tensor:
    """Attention step by step, for what torch's kernels don't know; softmax in float32."""
    scores = (torch.matmul(query, keys.transpose(2, 3)) * extras.scale).float()
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if extras.sinks is not None:
        # (N,) as (heads, groups): one row per query head where heads share keys.
        sinks = extras.sinks.float().reshape(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, sinks.expand(1, -1, scores.shape[2], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[2]].to(query.dtype)
    return torch.matmul(weights, values)
