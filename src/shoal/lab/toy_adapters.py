"""Adapters for toy blocks: every value of theirs changes every row."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

from shoal.base.adapters import AdapterConfig, AdapterPart, LoraShape, make_adapter_manifest
from shoal.lab.toy_blocks import HIDDEN_SIZE, TOY_LAYER


def toy_adapter(
    rng: random.Random, num_blocks: int, *, rank: int = 2, hidden_size: int = HIDDEN_SIZE
) -> AdapterPart:
    """A random adapter of all blocks."""
    shape = LoraShape(target=TOY_LAYER, inputs=hidden_size, outputs=hidden_size)
    count = shape.num_values(rank)
    blocks = {
        index: struct.pack(f"<{count}f", *(rng.uniform(-1, 1) for _ in range(count)))
        for index in range(num_blocks)
    }
    config = AdapterConfig(rank=rank, alpha=2.0 * rank, targets=(TOY_LAYER,))
    manifest = make_adapter_manifest(
        config, "float32", {index: ([shape], data) for index, data in blocks.items()}
    )
    return AdapterPart(manifest=manifest, blocks=blocks)


def toy_contents(adapter: AdapterPart | None) -> Mapping[int, bytes]:
    """What toy blocks mix into their rows, by block."""
    if adapter is None:
        return {}
    return {block.index: bytes.fromhex(block.content) for block in adapter.manifest.blocks}
