"""A whole pass of the model with gradients: embedding here, blocks at servers, head here.

Shapes: B rows, S columns, D hidden size, T tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.hf.model_inputs import wanted_columns
from shoal.hf.padding import RowPart, row_parts
from shoal.hf.training import Tuning, run_blocks

if TYPE_CHECKING:
    from shoal.hf.model import DistributedModelForCausalLM


def forward_whole(
    model: DistributedModelForCausalLM,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    tuning: Tuning | None,
) -> CausalLMOutputWithPast:
    """What `forward` gives, differentiable and without a cache; 0 where padding is.

    Raises:
        BadInput: shapes that don't fit, a mask with holes, a token that is none.
        NoRouteError, PeerError: the swarm could not do it.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise BadInput("give input_ids or inputs_embeds, one of them")
    if given.dim() != (2 if inputs_embeds is None else 3) or not given.numel():
        raise BadInput(f"an input of shape {tuple(given.shape)}: give (rows, tokens[, hidden])")
    columns = int(given.shape[1])
    parts = row_parts(attention_mask, pads=[0] * len(given), past=0, new=columns, is_kept=False)
    embeddings = model.head.look_up(given) if inputs_embeds is None else inputs_embeds
    hidden = run_padded(
        model, _entered(model, embeddings, parts), parts, Span(0, model.num_blocks), tuning
    )
    wanted, first = wanted_columns(logits_to_keep, columns)
    is_token = _tokens(parts, columns)[:, first:].to(hidden.device)
    scores = model.head.score_states(model.head.leave_blocks(hidden[:, first:][is_token]))
    shape = (*is_token.shape, scores.shape[-1])
    logits = scores.new_zeros(shape).index_put((is_token.cpu(),), scores).to(model.device)
    if wanted is not None:
        logits = logits[:, wanted]
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def run_padded(
    model: DistributedModelForCausalLM,
    hidden: torch.Tensor,
    parts: Sequence[RowPart],
    span: Span,
    tuning: Tuning | None,
) -> torch.Tensor:
    """(B, S, D) behind the blocks of `span`; padding is not sent, and comes back as 0."""
    model._check_no_adapter()
    is_token = _tokens(parts, int(hidden.shape[1])).to(hidden.device)
    rows = run_blocks(model, hidden[is_token], [part.count for part in parts], span, tuning)
    return torch.zeros_like(hidden).index_put((is_token,), rows)


def _entered(
    model: DistributedModelForCausalLM, embeddings: torch.Tensor, parts: Sequence[RowPart]
) -> torch.Tensor:
    """(B, S, D) rows for block 0; positions count from each row's first token."""
    rows = []
    for row, part in zip(embeddings, parts, strict=True):
        inside = model.head.enter_blocks(row[part.start : part.end].unsqueeze(0))[0]
        rows.append(functional.pad(inside, (0, 0, part.start, row.shape[0] - part.end)))
    return torch.stack(rows)


def _tokens(parts: Sequence[RowPart], columns: int) -> torch.Tensor:
    """(B, S) bool: what is no padding."""
    places = torch.arange(columns)
    return torch.stack([(places >= part.start) & (places < part.end) for part in parts])
