"""LoRA in the linear layers of a block, whatever form their weights have.

The layers stay as they are (plain, oneDNN's, quantised): a hook adds `scale * B(A(rows))` to
what they give. Here for whole batches that share one adapter, with gradients; many sessions
with adapters of their own in one pass are `lora_rows.py`.
Shapes: T rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from shoal.base.adapters import DropoutKey, RowRun
from shoal.base.errors import AdapterBad, InternalError
from shoal.model.lora_dropout import dropout_mask


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two matrices of one layer. May want gradients."""

    a: torch.Tensor
    """(R, I)"""
    b: torch.Tensor
    """(O, R)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDropout:
    """Which rows go through a block in training, and what their dropout is drawn from."""

    probability: float
    key: DropoutKey
    block: int
    runs: tuple[RowRun, ...]
    """All T rows in order."""


def lora_delta(
    rows: torch.Tensor, pair: LoraPair, scale: float, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, O) to add to a layer's result for (T, I) rows. Differentiable in rows, A and B.

    `kept` are factors (T, I) on the rows: 0 or 1 / (1 - probability).
    """
    chosen = rows if kept is None else rows * kept
    return functional.linear(functional.linear(chosen, pair.a), pair.b) * scale


@contextmanager
def lora_in(
    block: torch.nn.Module,
    pairs: Mapping[str, LoraPair],
    scale: float,
    dropout: LoraDropout | None = None,
) -> Iterator[None]:
    """While inside, the block's layers named by `pairs` add their LoRA to all rows they get.

    Raises:
        AdapterBad: a name that is no linear layer of this block.
    """
    with ExitStack() as stack:
        for target, pair in pairs.items():
            hook = _Hook(target, pair, scale, dropout)
            handle = target_layer(block, target).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def target_layer(block: torch.nn.Module, target: str) -> torch.nn.Module:
    """The linear layer at this path inside a block.

    Raises:
        AdapterBad: there is none.
    """
    found: torch.nn.Module | None = dict(block.named_modules()).get(target)
    if found is None or _features(found) is None:
        known = ", ".join(sorted(targets_of(block)))
        raise AdapterBad(f"no linear layer {target!r} in this block: it has {known}")
    return found


def targets_of(block: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of all linear layers of a block, by path."""
    return sizes_of(dict(block.named_modules()))


def stacked_weights_of(block: torch.nn.Module) -> tuple[str, ...]:
    """Paths of weights that several layers of a block share in one tensor, as experts do: no
    linear layers, so that they take no LoRA here (peft's `target_parameters`)."""
    return tuple(sorted(name for name, one in block.named_parameters() if one.dim() > 2))


def sizes_of(modules: Mapping[str, torch.nn.Module]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of those that are linear layers."""
    found = {name: _features(module) for name, module in modules.items()}
    return {name: size for name, size in found.items() if size is not None}


def _features(module: Any) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    return None


class _Hook:
    """Adds one layer's LoRA to its result."""

    def __init__(
        self, target: str, pair: LoraPair, scale: float, dropout: LoraDropout | None
    ) -> None:
        self._target = target
        self._pair = pair
        self._scale = scale
        self._dropout = dropout if dropout is not None and dropout.probability else None

    def __call__(
        self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        rows = rows.to(self._pair.a.dtype)
        delta = lora_delta(rows, self._pair, self._scale, self._kept(rows))
        return output + delta.reshape(output.shape).to(output.dtype)

    def _kept(self, rows: torch.Tensor) -> torch.Tensor | None:
        dropout = self._dropout
        if dropout is None:
            return None
        if sum(run.count for run in dropout.runs) != rows.shape[0]:
            raise InternalError(f"{self._target} gets other rows than the block")
        mask = dropout_mask(
            dropout.probability,
            dropout.key,
            dropout.block,
            self._target,
            dropout.runs,
            rows.shape[1],
        )
        return mask.to(rows) / (1 - dropout.probability)
