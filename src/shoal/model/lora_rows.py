"""Adapters of many sessions in one pass: each row gets its own session's, or none.

Layers that some loaded adapter targets have a hook, which adds `scale * B(A(rows))` to the rows
of each adapter in the pass; all others of the pass stay as they are, bit by bit. Tensors are
kept and multiplied in float32 whatever the model's dtype, as PEFT does: the products are small,
and oneDNN's bfloat16 calls take 40 us each where these take 5.

Exact mode: the rows of one adapter in a tile are padded to counts that keep a row's bits, found
by the probe of `exact.py` for each pair of shapes; where there are none they go one by one.
A client chooses the shapes, so each is probed in short jobs, with passes of others between.
Shapes: T rows of a pass, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

from shoal.base.adapters import (
    AdapterBlock,
    AdapterConfig,
    AdapterId,
    AdapterManifest,
    LoraShape,
)
from shoal.base.errors import AdapterBad, InternalError
from shoal.base.spans import Span
from shoal.model.adapter_tensors import read_pairs
from shoal.model.exact import search_product_counts
from shoal.model.lora import LoraPair, sizes_of
from shoal.model.lora_pass import current_pass
from shoal.model.row_tiles import RowTiles, tiles_of
from shoal.model.rows import all_finite

_ALIGNMENT_BYTES: Final = 64
"""Of torch's memory on CPUs. Libraries may sum in another order where rows begin elsewhere."""

Size = tuple[int, int]
"""(outputs, inputs) of a product."""

BlockModules = Callable[[int], dict[str, torch.nn.Module]]
"""The modules of a block, by path, that adapters may target."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One adapter in one layer, ready to run."""

    a: torch.Tensor
    """(R, I)"""
    b: torch.Tensor
    """(O, R), times the scale."""
    tiles: RowTiles | None

    def add(self, rows: torch.Tensor, result: torch.Tensor, *, is_tiled: bool) -> None:
        """Add to `result` (T, O), in place, what the adapter makes of `rows` (T, I)."""
        count = rows.shape[0]
        wide = rows.float()
        if not is_tiled:
            result += self._delta(wide)
            return
        step = 1 if self.tiles is None else self.tiles.rows_max
        for start in range(0, count, step):
            end = min(start + step, count)
            tile = wide[start:end]
            padding = 0 if self.tiles is None else self.tiles.padded(end - start) - (end - start)
            if padding:
                tile = functional.pad(tile, (0, 0, 0, padding))
            elif tile.data_ptr() % _ALIGNMENT_BYTES:
                tile = tile.clone()
            result[start:end] += self._delta(tile)[: end - start]

    def _delta(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(rows, self.a), self.b)


class LoraLayers:
    """The adapters in the blocks of a span. Use from the thread that runs the blocks."""

    def __init__(self, span: Span, modules: BlockModules, device: str, *, is_exact: bool) -> None:
        self._span = span
        self._modules = modules
        self._device = device
        self._is_exact = is_exact
        self._counts: dict[Size, set[int]] = {}
        """What probes found, exact mode: at most RANK_MAX for each width of the model."""
        self._hooks: dict[tuple[int, str], _Hook] = {}

    def check(self, manifest: AdapterManifest) -> None:
        """See that the layers are ours. From any thread.

        Raises:
            AdapterBad: they are not, by name or by shape.
        """
        for block in manifest.within(self._span):
            sizes = sizes_of(self._modules(block.index))
            for shape in block.shapes:
                _check_shape(block, shape, sizes)

    def unprobed(self, manifest: AdapterManifest, block: AdapterBlock) -> list[Size]:
        """What `probe` must see before this block is loaded. From any thread."""
        if not self._is_exact:
            return []
        rank = manifest.config.rank
        sizes = {(rank, shape.inputs) for shape in block.shapes}
        sizes |= {(shape.outputs, rank) for shape in block.shapes}
        return sorted(sizes - self._counts.keys())

    def probe(self, size: Size) -> Iterator[None]:
        """Find the row counts that keep a row's bits in products of this size, in steps."""
        like = torch.empty(size, dtype=torch.float32, device=self._device)
        self._counts[size] = yield from search_product_counts(like)

    def load(
        self, adapter: AdapterId, manifest: AdapterManifest, block: AdapterBlock, data: Any
    ) -> None:
        """Take one block's tensors in, after `probe`.

        Raises:
            AdapterBad: values that are not finite.
        """
        pairs = read_pairs(manifest, block, data)
        for target, pair in pairs.items():
            if not all_finite(pair.a) or not all_finite(pair.b):
                raise AdapterBad(f"block {block.index}: {target} holds values that are not finite")
        modules = self._modules(block.index)
        for target, pair in pairs.items():
            hook = self._hooks.get((block.index, target))
            if hook is None:
                hook = self._hooks[block.index, target] = _Hook(modules[target], target)
            hook.layers[adapter] = self._layer(pair, manifest.config)

    def drop(self, adapter: AdapterId) -> None:
        """Forget an adapter in all blocks."""
        for key, hook in list(self._hooks.items()):
            hook.layers.pop(adapter, None)
            if not hook.layers:
                hook.remove()
                del self._hooks[key]

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        layers = (layer for hook in self._hooks.values() for layer in hook.layers.values())
        return sum(layer.a.nbytes + layer.b.nbytes for layer in layers)

    def _layer(self, pair: LoraPair, config: AdapterConfig) -> _Layer:
        a = pair.a.to(self._device, torch.float32)
        b = (pair.b.float() * config.scale).to(self._device)
        return _Layer(a, b, self._tiles_for(a, b) if self._is_exact else None)

    def _tiles_for(self, a: torch.Tensor, b: torch.Tensor) -> RowTiles | None:
        (rank, inputs), outputs = a.shape, b.shape[0]
        return tiles_of(self._counts[rank, inputs] & self._counts[outputs, rank])


class _Hook:
    """All adapters of one layer."""

    def __init__(self, module: torch.nn.Module, target: str) -> None:
        self.layers: dict[AdapterId, _Layer] = {}
        self._target = target
        self._handle = module.register_forward_hook(self)

    def remove(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    def __call__(
        self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        chosen = [(run, self.layers[run.adapter]) for run in current_pass.runs
                  if run.adapter in self.layers]  # fmt: skip
        if not chosen:
            return output
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        output = output.contiguous()
        results = output.view(-1, output.shape[-1])
        if current_pass.num_rows not in (None, rows.shape[0]):
            raise InternalError(f"{self._target} gets other rows than its block")
        for run, layer in chosen:
            layer.add(
                rows[run.start : run.end], results[run.start : run.end], is_tiled=run.is_tiled
            )
        return output


def _check_shape(block: AdapterBlock, shape: LoraShape, sizes: dict[str, tuple[int, int]]) -> None:
    found = sizes.get(shape.target)
    if found is None:
        known = ", ".join(sorted(sizes))
        raise AdapterBad(
            f"block {block.index} has no linear layer {shape.target!r} for adapters: it has {known}"
        )
    if found != (shape.inputs, shape.outputs):
        raise AdapterBad(
            f"block {block.index}: {shape.target} has {found[0]} inputs and {found[1]} outputs, "
            f"the adapter {shape.inputs} and {shape.outputs}: it was made for another model"
        )
