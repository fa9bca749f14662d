"""Blocks at servers and a loss behind them, as one differentiable number.

A loss that is a sum over positions can be had of each micro-batch as it leaves the last block, and
its gradient goes back at once: servers compute while the head does here, and keep one or two
passes instead of all. The gradients are there before anybody asks for them, so that this is for
those who will: losses of one's own take `run_blocks`.
Shapes: T rows of all sequences, one after the other; N of a micro-batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.hf.loop import Errands
from shoal.hf.training import Like, Sums, Task, Tuning, batch_of, task_of
from shoal.model.rows import all_finite, rows_from_bytes, rows_to_bytes

if TYPE_CHECKING:
    from shoal.hf.model import DistributedModelForCausalLM

RowsLoss = Callable[[range, torch.Tensor], torch.Tensor]
"""Which of the T rows, and these (N, D) as they left the last block, to their part of the sum, a
float32 scalar. Differentiable in the rows."""


def loss_behind(
    model: DistributedModelForCausalLM,
    rows: torch.Tensor,
    lengths: Sequence[int],
    tuning: Tuning | None,
    loss: RowsLoss,
) -> torch.Tensor:
    """The sum of `loss` over all micro-batches behind all blocks, a scalar. Differentiable.

    Args:
        model: whose blocks.
        rows: (T, D) of whole sequences, as for `run_blocks`.
        lengths: positions of each sequence.
        tuning: what is trained inside the blocks.
        loss: called in this thread, in the order in which micro-batches come.

    Raises:
        BadInput: shapes that don't fit, values that are not finite.
        AdapterBad: LoRA matrices that don't fit the layers.
        NoRouteError, PeerError: the swarm could not do it.
    """
    task, leaves, wants = task_of(model, rows, lengths, Span(0, model.num_blocks), tuning)
    if not wants:
        return _Pass(task, rows, leaves, loss, is_back_wanted=False).total()
    result: torch.Tensor = _LossBehind.apply(task, loss, rows, *leaves)  # type: ignore[no-untyped-call]
    return result


class _LossBehind(torch.autograd.Function):
    """All of it happens on the way out; the way back only scales."""

    @staticmethod
    def forward(
        ctx: Any, task: Task, loss: RowsLoss, rows: torch.Tensor, *leaves: torch.Tensor
    ) -> torch.Tensor:
        done = _Pass(task, rows, leaves, loss, is_back_wanted=True)
        ctx.save_for_backward(done.row_gradients(), *done.sums.gradients())
        return done.total()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        above = gradients[0]
        return (None, None, *(one * above.to(one) for one in ctx.saved_tensors))


class _Pass:
    """One pass, done when it is made."""

    def __init__(
        self,
        task: Task,
        rows: torch.Tensor,
        leaves: Sequence[torch.Tensor],
        loss: RowsLoss,
        *,
        is_back_wanted: bool,
    ) -> None:
        self.sums = Sums(task.spec, [Like.of(leaf) for leaf in leaves])
        self._task = task
        self._loss = loss
        self._is_back_wanted = is_back_wanted
        self._like = Like.of(rows)
        self._parts: dict[int, torch.Tensor] = {}
        errands, batch, model = Errands(), batch_of(task, rows, leaves), task.model

        async def ending(chosen: range, left: bytes) -> bytes:
            return await errands.do(lambda: self._end(chosen, left))

        add = self.sums.add if is_back_wanted else None
        step = model.training_client.step(batch, ending, add)
        self._found = model.connection.loop.run(step, errands)

    def total(self) -> torch.Tensor:
        """The loss, added up in the order of micro-batches, however they came."""
        return torch.stack([self._parts[first] for first in sorted(self._parts)]).sum()

    def row_gradients(self) -> torch.Tensor:
        """(T, D)."""
        return self._rows(self._found, sum(self._task.lengths))

    def _end(self, chosen: range, left: bytes) -> bytes:
        """Take the loss of a micro-batch; the gradients of its rows, if they are wanted."""
        rows = self._rows(left, len(chosen))
        if not self._is_back_wanted:
            self._parts[chosen.start] = self._loss(chosen, rows)
            return b""
        rows.requires_grad_(True)
        with torch.enable_grad():
            part = self._loss(chosen, rows)
            (gradients,) = torch.autograd.grad(part, rows)
        if not all_finite(gradients):
            raise BadInput("gradients hold values that are not finite: lower the learning rate?")
        self._parts[chosen.start] = part.detach()
        return rows_to_bytes(gradients, self._task.encoding)

    def _rows(self, data: bytes, count: int) -> torch.Tensor:
        size = self._task.model.head.hidden_size
        rows = rows_from_bytes(data, self._task.encoding, count, size)
        return rows.to(dtype=self._like.dtype, device=self._like.device)
