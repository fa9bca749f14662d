"""Linear layers in the layout that oneDNN multiplies in.

torch's own linear layer keeps weights as they are stored and, on a CPU, rearranges them in
every call or leaves them to kernels that run well on one maker's processors only. Here that
is done once. Measured, one thread of an AVX-512 processor without AMX, weights of the 1.1B
shape, against `torch.nn.Linear`: float32 1.5 to 2 times as fast at one row, 2 to 4 times at
8 to 512; bfloat16 twice at 1 to 8 rows, equal at 512. It also has fewer classes of row counts
(`row_tiles.py`): in float32 {1} and {2..32}, where torch has {1}, {2, 3} and {4..32}.
The first call with a new number of rows takes milliseconds: its kernel is made then.

The operators are torch's own; its compiler uses them for frozen models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Self

import torch
from torch.nn import functional

from shoal.model.training_linear import frozen_product

_KEPT: Final = ("kv_b_proj",)
"""Layers whose weights are taken apart elsewhere: see `latent_attention.py`."""


_VALUES_MIN: Final = 1 << 16
"""Smaller layers are in the processor's cache, and calls cost 8 us more: nothing to gain."""


class OneDnnLinear(torch.nn.Module):
    """The same product as a plain linear layer, whose weights it takes over."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.item_bytes = linear.weight.element_size()
        self.bias = linear.bias
        self._weight: torch.Tensor = _packed(linear.weight.detach())
        self._transposed: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight.dtype

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., outputs) of (..., inputs)."""
        if torch.is_grad_enabled():
            return frozen_product(self, rows)
        return self.product(rows)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """The same without gradients."""
        if not self._weight.is_mkldnn:
            return functional.linear(rows, self._weight, self.bias)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self.bias, "none", [], ""
        )
        return result

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """(..., inputs) from the gradient (..., outputs) of the result."""
        if self._transposed is None:
            return gradient @ self._dense()
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            gradient, self._transposed, None, "none", [], ""
        )
        return result

    def keep_transposed(self) -> int:
        """Hold the weights a second time, for `input_gradient`; returns the bytes that it takes.

        Measured, float32, 512 rows of the 135M shape: 5.3 ms instead of 13.4 ms per product.
        """
        if self._transposed is not None or not self._weight.is_mkldnn:
            return 0
        weight = self._dense()
        self._transposed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous())
        return self.transposed_bytes

    @property
    def transposed_bytes(self) -> int:
        """What `keep_transposed` holds."""
        if self._transposed is None:
            return 0
        return self.in_features * self.out_features * self.item_bytes

    def _dense(self) -> torch.Tensor:
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Another device or dtype, as `Module.to` asks for: there the weights may be plain."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weight, self._transposed = _packed(fn(self._dense())), None
        self.item_bytes = self._weight.element_size()
        return self


def packed_linear(linear: torch.nn.Linear) -> torch.nn.Module:
    """The same product in oneDNN's layout, or the layer itself where oneDNN does not take it.

    The layer's own weights stay where somebody else holds them, such as a tied embedding.
    """
    return OneDnnLinear(linear) if _is_taken(linear.weight) else linear


@torch.inference_mode()
def use_onednn(block: torch.nn.Module) -> None:
    """Replace the plain linear layers of `block`, one by one, where oneDNN takes their dtype."""
    places = [
        (parent, name)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and name not in _KEPT and _is_taken(child.weight)
    ]
    for parent, name in places:  # whoever held the layers as well would keep them all in memory
        setattr(parent, name, OneDnnLinear(getattr(parent, name)))


def _packed(weight: torch.Tensor) -> torch.Tensor:
    if not _is_known(weight):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _is_taken(weight: torch.Tensor) -> bool:
    return weight.numel() >= _VALUES_MIN and _is_known(weight)


def _is_known(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
