"""The loss of next tokens, in pieces: scores of a whole batch at once would fill the memory.

2,048 positions of a vocabulary of 49,152 are 400 MB of scores, and as much again for their
gradient. The head is frozen, so that all that is needed of it is the gradient of its input:
that is computed piece by piece while the loss is.
Shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

PIECE_ROWS: Final = 128
"""Positions whose scores are in memory at a time: 25 MB of a vocabulary of 49,152."""

Scores = Callable[[torch.Tensor], torch.Tensor]
"""(N, D) states to (N, V) scores."""


def next_token_loss(states: torch.Tensor, labels: torch.Tensor, scores: Scores) -> torch.Tensor:
    """The sum over N positions of -log p(label), a scalar; differentiable in `states`.

    Args:
        states: (N, D) behind the final norm.
        labels: (N,) token ids.
        scores: the frozen head.
    """
    found: torch.Tensor = _PiecewiseLoss.apply(states, labels, scores)  # type: ignore[no-untyped-call]
    return found


class _PiecewiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: torch.Tensor, labels: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32)
        wants_grad = context.needs_input_grad[0]
        grads = torch.empty_like(states) if wants_grad else None
        for start in range(0, len(labels), PIECE_ROWS):
            piece = states[start : start + PIECE_ROWS].detach()
            wanted = labels[start : start + PIECE_ROWS]
            if grads is None:
                total += cross_entropy(scores(piece).float(), wanted, reduction="sum")
                continue
            with torch.enable_grad():
                piece.requires_grad_(True)
                loss = cross_entropy(scores(piece).float(), wanted, reduction="sum")
                (grad,) = torch.autograd.grad(loss, piece)
            grads[start : start + PIECE_ROWS] = grad
            total += loss.detach()
        if grads is not None:
            context.save_for_backward(grads)
        return total

    @staticmethod
    def backward(context: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grads,) = context.saved_tensors
        return grads * above[0], None, None
