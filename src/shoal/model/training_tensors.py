"""Tensors that are trained inside blocks, between bytes and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from shoal.base.backend import BackendFacts
from shoal.base.errors import AdapterBad, BadInput
from shoal.base.training import BlockTensors, PassWork, TrainedTensors
from shoal.model.lora import LoraPair, targets_of
from shoal.model.rows import DTYPES, all_finite, tensor_bytes
from shoal.model.span_model import SpanModel


@dataclass(slots=True, kw_only=True)
class BlockParts:
    """What is trained inside one block, in float32."""

    prompt: torch.Tensor | None
    """(P, D)"""
    pairs: Mapping[str, LoraPair]
    gradients: list[torch.Tensor] = field(default_factory=list)
    """Of the leaves, once a pass came back."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All tensors, in the order of their bytes."""
        prompts = [] if self.prompt is None else [self.prompt]
        return prompts + [half for pair in self.pairs.values() for half in (pair.a, pair.b)]

    def gradient_bytes(self) -> bytes:
        """The gradients in float32, in the order of the tensors' bytes."""
        found = (one.to("cpu", torch.float32) for one in self.gradients)
        return b"".join(bytes(tensor_bytes(one)) for one in found)


def parts_of(work: PassWork, facts: BackendFacts, device: str) -> dict[int, BlockParts]:
    """The trained tensors of a pass, by block. They want gradients.

    Raises:
        BadInput: sizes that don't add up, or sequences shorter than a prompt.
        AdapterBad: values that are not finite.
    """
    trained = work.trained
    if trained is None:
        return {}
    spec, size = trained.spec, facts.hidden_size
    num_bytes, expected = memoryview(trained.values).nbytes, spec.num_bytes(size)
    if num_bytes != expected:
        raise BadInput(f"{num_bytes} bytes of trained tensors, not {expected}")
    if spec.prompt_tokens > min(work.lengths):
        raise BadInput(
            f"a deep prompt of {spec.prompt_tokens} rows and a sequence of {min(work.lengths)}: "
            "put as many rows in front of every sequence"
        )
    dtype = DTYPES[spec.encoding]
    parts: dict[int, BlockParts] = {}
    for block, values in spec.parts(trained.values, size):
        # One copy: torch wants memory that can be written to.
        flat = torch.frombuffer(bytearray(values), dtype=dtype)
        if not all_finite(flat):
            raise AdapterBad(f"tensors of block {block.index} hold values that are not finite")
        flat = flat.to(device=device, dtype=torch.float32)
        parts[block.index] = _parts(block, flat, size, spec.rank)
    return parts


def _parts(block: BlockTensors, flat: torch.Tensor, size: int, rank: int) -> BlockParts:
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        end = at + prod(shape)
        leaf = flat[at:end].view(shape).clone().requires_grad_()
        at = end
        return leaf

    prompt = take(block.prompt_tokens, size) if block.prompt_tokens else None
    pairs = {
        one.target: LoraPair(take(rank, one.inputs), take(one.outputs, rank)) for one in block.lora
    }
    return BlockParts(prompt=prompt, pairs=pairs)


def check_shapes(trained: TrainedTensors, model: SpanModel) -> None:
    """Refuse tensors that don't fit the blocks.

    Raises:
        BadInput: blocks that are not held.
        AdapterBad: layers that a block doesn't have, or of other sizes.
    """
    for block in trained.spec.blocks:
        if block.index not in model.span:
            raise BadInput(f"trained tensors of block {block.index}, but here are {model.span}")
        known = targets_of(model.block(block.index)) if block.lora else {}
        for one in block.lora:
            if one.target not in known:
                names = ", ".join(sorted(known))
                raise AdapterBad(
                    f"block {block.index} has no linear layer {one.target!r}: it has {names}"
                )
            if known[one.target] != (one.inputs, one.outputs):
                inputs, outputs = known[one.target]
                raise AdapterBad(
                    f"{one.target} of block {block.index} takes {inputs} values and gives "
                    f"{outputs}, not {one.inputs} and {one.outputs}"
                )
