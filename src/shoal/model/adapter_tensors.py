"""Adapters between tensors and the bytes that travel.

Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.base.adapters import (
    AdapterBlock,
    AdapterConfig,
    AdapterEncoding,
    AdapterManifest,
    AdapterPart,
    LoraShape,
    make_adapter_manifest,
)
from shoal.base.errors import AdapterBad
from shoal.model.lora import LoraPair
from shoal.model.rows import DTYPES, all_finite, tensor_bytes

BlockPairs = Mapping[int, Mapping[str, LoraPair]]
"""The matrices of an adapter by block and target."""


def adapter_of(config: AdapterConfig, encoding: AdapterEncoding, pairs: BlockPairs) -> AdapterPart:
    """A whole adapter of these tensors, rounded to `encoding`.

    Raises:
        AdapterBad: shapes that don't go together, or values that are not finite.
    """
    blocks: dict[int, tuple[list[LoraShape], bytes]] = {}
    for index, layers in pairs.items():
        if not layers:
            continue
        ordered = sorted(layers.items())
        shapes = [_shape(config, index, target, pair) for target, pair in ordered]
        blocks[index] = shapes, b"".join(_bytes(pair, encoding) for _, pair in ordered)
    if not blocks:
        raise AdapterBad("an adapter without tensors")
    manifest = make_adapter_manifest(config, encoding, blocks)
    return AdapterPart(
        manifest=manifest, blocks={index: data for index, (_, data) in blocks.items()}
    )


def pairs_of(part: AdapterPart) -> dict[int, dict[str, LoraPair]]:
    """All tensors of an adapter, in its own dtype, on the CPU."""
    return {
        block.index: read_pairs(part.manifest, block, part.blocks[block.index])
        for block in part.manifest.blocks
        if block.index in part.blocks
    }


def read_pairs(
    manifest: AdapterManifest, block: AdapterBlock, data: bytes | bytearray | memoryview
) -> dict[str, LoraPair]:
    """The tensors of one block, by target, in the adapter's own dtype, on the CPU.

    They share memory with a writable `data`, whose size was checked.
    """
    view = memoryview(data)
    values = torch.frombuffer(
        bytearray(view) if view.readonly else view, dtype=DTYPES[manifest.encoding]
    )
    rank, at = manifest.config.rank, 0
    pairs: dict[str, LoraPair] = {}
    for shape in block.shapes:
        middle = at + rank * shape.inputs
        end = middle + rank * shape.outputs
        a, b = values[at:middle], values[middle:end]
        pairs[shape.target] = LoraPair(a.view(rank, shape.inputs), b.view(shape.outputs, rank))
        at = end
    return pairs


def _shape(config: AdapterConfig, index: int, target: str, pair: LoraPair) -> LoraShape:
    where = f"block {index}: {target}"
    if pair.a.dim() != 2 or pair.b.dim() != 2:
        raise AdapterBad(f"{where}: A and B must be matrices")
    (rank, inputs), (outputs, rank_b) = pair.a.shape, pair.b.shape
    if (rank, rank_b) != (config.rank, config.rank):
        raise AdapterBad(
            f"{where} has rank {rank} in A and {rank_b} in B, the adapter says {config.rank}"
        )
    if target not in config.targets:
        raise AdapterBad(f"{where} is none of the adapter's targets {', '.join(config.targets)}")
    if not all_finite(pair.a) or not all_finite(pair.b):
        raise AdapterBad(f"{where} holds values that are not finite")
    return LoraShape(target=target, inputs=inputs, outputs=outputs)


def _bytes(pair: LoraPair, encoding: AdapterEncoding) -> bytes:
    dtype = DTYPES[encoding]
    return b"".join(
        bytes(tensor_bytes(tensor.detach().to("cpu", dtype))) for tensor in (pair.a, pair.b)
    )
