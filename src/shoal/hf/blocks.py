"""The blocks at the servers as one torch module that can be sliced like a list.

`model.blocks[2:10](hidden_states)` runs blocks 2 to 9. Nothing is kept between calls; for
token by token use a session.
Shapes: B rows, S positions, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.hf.padding import RowPart, row_parts
from shoal.hf.training import Tuning
from shoal.hf.training_forward import run_padded

if TYPE_CHECKING:
    from shoal.hf.model import DistributedModelForCausalLM


class RemoteBlocks(torch.nn.Module):
    """The blocks [start, end) of a model, frozen. Gradients flow through them."""

    def __init__(self, model: DistributedModelForCausalLM, span: Span) -> None:
        super().__init__()
        self.span = span
        # In a tuple: torch would take the model for a part of this module.
        self._owner = (model,)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """Some of the blocks, counted from this module's first one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"no block {index} in {self.span}")
            first = index % len(self)
            chosen = range(first, first + 1)
        else:
            chosen = range(len(self))[index]
        if not chosen or chosen.step != 1:
            raise BadInput(f"blocks {index}: choose at least one, in order and without gaps")
        start = self.span.start + chosen.start
        return RemoteBlocks(self._owner[0], Span(start, start + len(chosen)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tuning: Tuning | None = None,
    ) -> torch.Tensor:
        """What leaves the last of these blocks. Differentiable.

        Args:
            hidden_states: (B, S, D) or (S, D), each row a sequence from position 0.
            attention_mask: (B, S), 0 for padding, which comes back as 0.
            tuning: what is trained inside these blocks; default: the model's.

        Returns:
            The same shape, dtype and place.

        Raises:
            BadInput: a wrong shape, or values that are not finite.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        model = self._owner[0]
        tuning = tuning or model.tuning
        size = model.head.hidden_size
        batch = hidden_states[None] if hidden_states.dim() == 2 else hidden_states
        if batch.dim() != 3 or batch.shape[2] != size or not batch.numel():
            raise BadInput(
                f"hidden states of shape {tuple(hidden_states.shape)}: give (rows, positions, "
                f"{size})"
            )
        rows, count = int(batch.shape[0]), int(batch.shape[1])
        wants = torch.is_grad_enabled() and hidden_states.requires_grad
        if wants or tuning is not None or attention_mask is not None:
            parts = row_parts(attention_mask, pads=[0] * rows, past=0, new=count, is_kept=False)
            whole = run_padded(model, batch, parts, self.span, tuning)
            return whole.reshape(hidden_states.shape)
        cache = model.new_cache((self.span.start, self.span.end))
        try:
            parts = [RowPart(start=0, end=count)] * rows
            found = cache.step("hidden", batch, parts, [count] * rows)
        finally:
            cache.close()
        states = torch.stack([row[-1] for row in found]).reshape(hidden_states.shape)
        return states.to(device=hidden_states.device, dtype=hidden_states.dtype)

    def extra_repr(self) -> str:
        """The span."""
        return f"span={self.span}"
