"""Gradients through linear layers whose weights are frozen and in a form of their own.

torch knows no derivative of products with packed or quantised weights. Training wants just
that of the rows, which is a product with the transposed weights. Gradients of quantised
layers treat the rounding of rows to bfloat16 as if it weren't there.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class FrozenLinear(Protocol):
    """A linear layer that multiplies by hand."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., outputs) of (..., inputs); called without gradients."""

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """(..., inputs) from the gradient (..., outputs) of the product."""


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.input_gradient(gradients[0]), None


def frozen_product(layer: FrozenLinear, rows: torch.Tensor) -> torch.Tensor:
    """`layer.product(rows)`, differentiable in the rows."""
    result: torch.Tensor = _FrozenProduct.apply(rows, layer)  # type: ignore[no-untyped-call]
    return result
