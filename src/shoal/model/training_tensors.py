"""Tensors that are trained inside blocks, between bytes and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from shoal.base.errors import AdapterBad, BadInput
from shoal.base.training import BlockTensors, PassWork, TrainedSpec, TrainedTensors
from shoal.model.lora import LoraPair, targets_of
from shoal.model.rows import DTYPES, all_finite
from shoal.model.span_model import SpanModel


@dataclass(slots=True, kw_only=True)
class BlockParts:
    """What is trained inside one block, in float32."""

    prompt: torch.Tensor | None
    """(P, D)"""
    pairs: Mapping[str, LoraPair]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All tensors, in the order of their bytes."""
        prompts = [] if self.prompt is None else [self.prompt]
        return prompts + [half for pair in self.pairs.values() for half in (pair.a, pair.b)]

    @property
    def num_bytes(self) -> int:
        """Memory of all of them."""
        return sum(leaf.nbytes for leaf in self.leaves)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockValues:
    """What is trained inside one block, as it came."""

    block: BlockTensors
    values: memoryview
    first: int
    """Number of its first value among those of all blocks."""
    num_values: int


def values_of(work: PassWork, hidden_size: int) -> dict[int, BlockValues]:
    """Each block's share of a pass' trained tensors, uncopied.

    Raises:
        BadInput: sizes or blocks that don't fit, or sequences shorter than a prompt.
    """
    trained = work.trained
    if trained is None:
        return {}
    spec = trained.spec
    num_bytes, expected = memoryview(trained.values).nbytes, spec.num_bytes(hidden_size)
    if num_bytes != expected:
        raise BadInput(f"{num_bytes} bytes of trained tensors, not {expected}")
    if spec.prompt_tokens > min(work.lengths):
        raise BadInput(
            f"a deep prompt of {spec.prompt_tokens} rows and a sequence of {min(work.lengths)}: "
            "put as many rows in front of every sequence"
        )
    found: dict[int, BlockValues] = {}
    first = 0
    for block, values in spec.parts(trained.values, hidden_size):
        if block.index not in work.span:
            raise BadInput(f"trained tensors of block {block.index}, outside of {work.span}")
        count = block.num_values(hidden_size, spec.rank)
        found[block.index] = BlockValues(block=block, values=values, first=first, num_values=count)
        first += count
    return found


def read_parts(one: BlockValues, spec: TrainedSpec, hidden_size: int, device: str) -> BlockParts:
    """The trained tensors of one block. They want gradients.

    Raises:
        AdapterBad: values that are not finite.
    """
    # One copy: torch wants memory that can be written to.
    flat = torch.frombuffer(bytearray(one.values), dtype=DTYPES[spec.encoding])
    if not all_finite(flat):
        raise AdapterBad(f"tensors of block {one.block.index} hold values that are not finite")
    flat = flat.to(device=device, dtype=torch.float32)
    return _parts(one.block, flat, hidden_size, spec.rank)


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
