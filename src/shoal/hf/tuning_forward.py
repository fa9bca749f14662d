"""A tuned model as transformers calls one: ids and masks in, loss and logits out.

For `transformers.Trainer` and loops written for transformers' models. `TunedModel` below it
takes batches without masks.
Shapes: B rows, S columns, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from shoal.base.adapters import DropoutKey
from shoal.base.errors import BadInput
from shoal.hf.padding import RowPart, row_parts
from shoal.hf.tuning_examples import IGNORED, PAD_ID, Batch
from shoal.hf.tuning_model import TunedModel


class TunedForward(torch.nn.Module):
    """Calls a `TunedModel` as transformers' models are called. Its parameters are that
    model's."""

    def __init__(self, tuned: TunedModel, *, seed: int = 0) -> None:
        """`seed` is that of LoRA's dropout, which is drawn anew for every call."""
        super().__init__()
        self.tuned = tuned
        self._seed = seed
        self._num_calls = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> CausalLMOutput | SequenceClassifierOutput:
        """The mean loss of labels, or without labels the logits.

        Args:
            input_ids: (B, S), padded on either side.
            attention_mask: (B, S); None: no padding.
            labels: (B, S) token ids with -100 where nothing counts, not shifted, as
                transformers has it; or (B,) classes, for a model with a head for them.
            num_items_in_batch: what to divide the loss by instead of the labels that count
                here; `Trainer` gives it when it accumulates gradients.

        Returns:
            loss, or logits: (B, S, V) with 0 for padding, or (B, C), which come with the
            loss too.

        Raises:
            BadInput: a mask with holes, shapes that don't fit.
            NoRouteError, PeerError: the swarm could not do it.
        """
        if input_ids.dim() != 2 or not input_ids.numel():
            raise BadInput(f"input_ids of shape {tuple(input_ids.shape)}: give (rows, tokens)")
        rows, columns = int(input_ids.shape[0]), int(input_ids.shape[1])
        parts = row_parts(attention_mask, pads=[0] * rows, past=0, new=columns, is_kept=False)
        ids = _moved(input_ids, parts, PAD_ID)
        lengths = tuple(part.count for part in parts)
        is_classes = self.tuned.classes is not None
        if labels is None:
            logits = self.tuned.logits(ids, lengths)
            if is_classes:
                return SequenceClassifierOutput(logits=logits)
            return CausalLMOutput(logits=_moved_back(logits, parts, columns))
        expected = (rows,) if is_classes else (rows, columns)
        if tuple(labels.shape) != expected:
            raise BadInput(f"labels of shape {tuple(labels.shape)}: give {expected}")
        moved = labels if is_classes else _moved(labels, parts, IGNORED)
        self._num_calls += self.training
        key = DropoutKey(seed=self._seed, step=self._num_calls)
        found = self.tuned(Batch(ids=ids, lengths=lengths, labels=moved), key)
        if not found.num_counted:
            raise BadInput("no label counts: all are -100, or rows have one token")
        loss = found.total / (num_items_in_batch or found.num_counted)
        if is_classes:
            return SequenceClassifierOutput(loss=loss, logits=found.scores)
        return CausalLMOutput(loss=loss)


def _moved(values: torch.Tensor, parts: list[RowPart], padding: int) -> torch.Tensor:
    """The same rows from column 0 on, as short as they can be."""
    moved = torch.full((len(parts), max(part.count for part in parts)), padding, dtype=values.dtype)
    for row, part in enumerate(parts):
        moved[row, : part.count] = values[row, part.start : part.end]
    return moved


def _moved_back(logits: torch.Tensor, parts: list[RowPart], columns: int) -> torch.Tensor:
    """Scores at the columns that their tokens came in."""
    batch = logits.new_zeros(len(parts), columns, logits.shape[-1])
    for row, part in enumerate(parts):
        batch[row, part.start : part.end] = logits[row, : part.count]
    return batch
