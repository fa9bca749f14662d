"""Between the arguments of `forward` and rows: pure functions on tensors.

Shapes: B rows, S new columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.base.errors import BadInput
from shoal.hf.chain_cache import ChainCache
from shoal.hf.chain_row import ChunkKind
from shoal.hf.padding import RowPart
from shoal.hf.sessions import check_inference


def batch_of_scores(
    scores: torch.Tensor,
    parts: Sequence[RowPart],
    keeps: Sequence[int],
    *,
    first: int,
    columns: int,
) -> torch.Tensor:
    """(B, columns - first, V): the last `keeps[i]` scores of each row at their columns.

    `scores` holds them one row after the other; padding gets 0.
    """
    kept = columns - first
    if all(keep == kept for keep in keeps):
        return scores.reshape(len(keeps), kept, -1)
    batch = scores.new_zeros(len(keeps), kept, scores.shape[-1])
    done = 0
    for index, (keep, part) in enumerate(zip(keeps, parts, strict=True)):
        end = max(part.end - first, 0)
        batch[index, end - keep : end] = scores[done : done + keep]
        done += keep
    return batch


def batch_of_states(
    rows: Sequence[torch.Tensor], parts: Sequence[RowPart], columns: int
) -> torch.Tensor:
    """(B, S, D) float32 of each row's (tokens, D) at its columns; padding gets 0."""
    batch = torch.zeros(len(rows), columns, rows[0].shape[-1])
    for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
        batch[index, part.start : part.end] = row.to("cpu", torch.float32)
    return batch


def the_input(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[ChunkKind, torch.Tensor]:
    """What goes in, (B, S) ids or (B, S, D) embeddings.

    Raises:
        BadInput: none, both, a wrong shape, or gradients wanted.
    """
    if input_ids is not None and inputs_embeds is not None:
        raise BadInput("input_ids and inputs_embeds: give one of them")
    if input_ids is not None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise BadInput(f"input_ids of shape {tuple(input_ids.shape)}: give (rows, tokens)")
        return "ids", input_ids
    if inputs_embeds is None:
        raise BadInput("give input_ids or inputs_embeds")
    if inputs_embeds.dim() != 3 or not inputs_embeds.numel():
        raise BadInput(f"inputs_embeds of shape {tuple(inputs_embeds.shape)}: give 3 dimensions")
    check_inference(inputs_embeds)
    return "embeddings", inputs_embeds


def check_has_news(inputs: Any = None, *_: Any, **kwargs: Any) -> None:
    """Refuse a text that the cache holds as a whole: transformers would run all of it again."""
    ids = kwargs.get("input_ids") if inputs is None else inputs
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, ChainCache) or ids is None or ids.dim() != 2:
        return
    is_whole = mask is None or mask.shape == ids.shape
    if is_whole and ids.shape[1] <= cache.get_seq_length():
        raise BadInput(
            f"the cache holds {cache.get_seq_length()} tokens, the input {ids.shape[1]}: give the "
            "whole text with at least one token more, or crop the cache"
        )


def wanted_columns(
    logits_to_keep: int | torch.Tensor, columns: int
) -> tuple[torch.Tensor | None, int]:
    """Which columns to pick from the logits afterwards, and from which on they are computed."""
    if isinstance(logits_to_keep, torch.Tensor):
        return logits_to_keep.cpu(), 0
    return None, max(0, columns - logits_to_keep) if logits_to_keep > 0 else 0
