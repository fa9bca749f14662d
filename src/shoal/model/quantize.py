"""Smaller weights for a block: which of its layers, how, and what they then weigh.

A layer is quantised right after it was read, so that loading a span needs the memory of
the quantised span and one layer more. Embedding and head are the client's and stay as
they are. On CUDA devices bitsandbytes does the work (`quantized_cuda.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, get_args

import torch

from shoal.base.errors import ConfigError, ModelUnsupported
from shoal.model.quantized_cuda import cuda_linear, require_bitsandbytes
from shoal.model.quantized_linear import Int4Linear, Int8Linear, int4_bytes, int8_bytes

Quantization = Literal["none", "int8", "int4"]
"""Of the weights. int8: a scale per output; half of bfloat16's memory. int4: groups of 32
inputs share scale and offset; 0.31 of it, and a visible loss (`benchmarks/quantized.py`)."""

SHARE_MIN: Final = 0.5
"""A block with less of its weights in plain linear layers is refused: it would hardly
become smaller (experts kept in one tensor, convolutions)."""


def quantization(name: str) -> Quantization:
    """The kind called `name`.

    Raises:
        ConfigError: there is none.
    """
    kinds: tuple[Quantization, ...] = get_args(Quantization)
    for kind in kinds:
        if name == kind:
            return kind
    raise ConfigError(f"quantize {name!r}: write {', '.join(kinds)}")


def check_quantize(quantize: str, device: str) -> None:
    """Refuse what can't be before anything is loaded.

    Raises:
        ConfigError: an unknown kind, or a CUDA device without bitsandbytes.
    """
    if quantization(quantize) != "none" and device.startswith("cuda"):
        require_bitsandbytes()


def quantizer(
    block: torch.nn.Module, quantize: Quantization, device: str
) -> Callable[[str], None] | None:
    """What replaces the block's part at a path, once it has its weights, by a quantised one.

    Linear layers only; None: nothing is to be quantised. The block may be on meta still.

    Raises:
        ModelUnsupported: most weights are not in linear layers; when called, shapes that
            don't fit.
    """
    if quantize == "none":
        return None
    _check_share(block)

    def replace(path: str) -> None:
        if type(block.get_submodule(path)) is not torch.nn.Linear:
            return
        above, _, name = path.rpartition(".")
        parent = block.get_submodule(above)
        setattr(parent, name, quantized_linear(getattr(parent, name), quantize, device))

    return replace


def quantized_linear(
    linear: torch.nn.Linear, quantize: Quantization, device: str
) -> torch.nn.Module:
    """The layer with smaller weights, on its device.

    Raises:
        ModelUnsupported: a shape that doesn't fit.
    """
    if quantize == "none":
        return linear
    if device.startswith("cuda"):
        return cuda_linear(linear, quantize, device)
    return Int8Linear(linear) if quantize == "int8" else Int4Linear(linear)


def quantized_bytes(block: torch.nn.Module, quantize: Quantization) -> int:
    """Memory of a block's weights once quantised on the CPU; meta tensors will do.

    Raises:
        ModelUnsupported: as `quantize_block`.
    """
    total = sum(_bytes_of(tensor) for tensor in block.state_dict().values())
    if quantize == "none":
        return total
    _check_share(block)
    size_of = int8_bytes if quantize == "int8" else int4_bytes
    for _, _, linear in _linears(block):
        total -= _bytes_of(linear.weight)
        total += size_of(linear.in_features, linear.out_features)
    return total


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _linears(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(parent, name, layer) of all plain linear layers of a block."""
    for parent in block.modules():
        for name, child in parent.named_children():
            # Not subclasses: some choose experts or mean something else by their weight.
            if type(child) is torch.nn.Linear:
                yield parent, name, child


def _check_share(block: torch.nn.Module) -> None:
    total = sum(weight.numel() for weight in block.parameters())
    covered = sum(linear.weight.numel() for _, _, linear in _linears(block))
    if covered < SHARE_MIN * total:
        raise ModelUnsupported(
            f"only {covered / max(1, total):.0%} of a block's weights are in linear layers that "
            "can be quantised (experts and convolutions can't yet): leave --quantize out"
        )
