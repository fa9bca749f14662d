"""Memory of training: what graphs hold, and weights that were loaded for inference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class HeldCount:
    """Memory of what graphs hold, weights aside."""

    weights: frozenset[int]
    num_bytes: int = 0
    _seen: set[int] = field(default_factory=set)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's memory once."""
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in self.weights and place not in self._seen:
                self._seen.add(place)
                self.num_bytes += storage.nbytes()
        return tensor


def leave_inference(root: torch.nn.Module) -> None:
    """Give `root` weights and tables that graphs may hold: the same memory under new names.

    Tensors that were made in inference mode can't be part of a graph.
    """
    for module in root.modules():
        for name, weight in module._parameters.items():
            if type(weight) is torch.nn.Parameter and weight.is_inference():
                alias = torch.nn.Parameter(_alias(weight), requires_grad=False)
                module._parameters[name] = alias
        for name, table in module._buffers.items():
            if table is not None and table.is_inference():
                module._buffers[name] = _alias(table)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = tensor.untyped_storage()
    alias.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return alias
