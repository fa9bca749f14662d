"""Mixtures of experts whose rows have the same bits in any company.

transformers multiplies all rows that chose an expert at once. How many these are depends
on the company, and so do the bits. Here each expert takes its rows in tiles: row counts
within which a row's bits don't change (`row_tiles.py`). Each row then adds up its experts
in float32, in the order of their numbers. Routers get tiles of their own: some compute in
float32 whatever the model does, with other classes of row counts.
Shapes: T rows, D hidden size, E experts, k experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shoal.base.errors import InternalError
from shoal.model.row_tiles import RowTiles

NAME: Final = "shoal_tiled"
"""What the experts function is called in transformers' registry."""

_EXPERTS: Final = "experts"
"""What transformers calls them in every family."""

_ROUTERS: Final = ("gate", "router")
"""What transformers calls what chooses them."""


class TiledExperts:
    """All experts and routers of some blocks. They are transformers' own until `use`."""

    def __init__(self, config: Any, blocks: Iterable[torch.nn.Module]) -> None:
        self._config = config
        self._before = getattr(config, "_experts_implementation", None)
        parents = _parents(blocks)
        self.experts: list[Any] = [getattr(parent, _EXPERTS) for parent in parents]
        self.routers: list[Any] = [
            router for parent in parents if (router := _router_of(parent)) is not None
        ]
        self.num_rows: int | None = None
        """Rows of the pass under way that are somebody's; the others are padding, and
        nobody's experts are read for them. None: all."""
        self.tiles: RowTiles | None = None

    def __bool__(self) -> bool:
        return bool(self.experts)

    @property
    def can_be_tiled(self) -> bool:
        """Whether all experts have the one form that is known here."""
        return all(
            getattr(experts, "has_gate", False)
            and not experts.has_post_expert_norm
            and experts.gate_up_proj.dim() == experts.down_proj.dim() == 3
            for experts in self.experts
        ) and all(hasattr(router, "weight") for router in self.routers)

    @property
    def is_free(self) -> bool:
        """Whether exact mode costs nothing here: measured, tiles take 10 to 20 % of decode."""
        return not self.experts

    def use(self, tiles: RowTiles, router_tiles: RowTiles) -> None:
        """Compute in tiles from now on."""
        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
        self._config._experts_implementation = NAME
        self.tiles = tiles
        for experts in self.experts:
            experts.shoal_tiled = self
        for router in self.routers:
            router.forward = _in_tiles(type(router).forward.__get__(router), router_tiles)

    def reset(self) -> None:
        """Back to transformers' own."""
        if self.tiles is None:
            return
        self._config._experts_implementation = self._before
        self.tiles = None
        for router in self.routers:
            del router.forward


def has_experts(blocks: Iterable[torch.nn.Module]) -> bool:
    """Whether any of the blocks is a mixture of experts."""
    return bool(_parents(blocks))


def expert_product(experts: Any, name: str, index: int, tile: torch.Tensor) -> torch.Tensor:
    """`tile` times one expert's matrix `gate_up_proj` or `down_proj`, with its bias."""
    weight = getattr(experts, name)[index]
    bias = getattr(experts, f"{name}_bias")[index] if experts.has_bias else None
    return functional.linear(tile, weight.T if experts.is_transposed else weight, bias)


def _experts_forward(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: (T, D) of (T, D) rows, (T, k) experts and weights."""
    order: TiledExperts = experts.shoal_tiled
    tiles = order.tiles
    if tiles is None:
        raise InternalError("tiled experts without tiles")
    total = hidden.shape[0] if order.num_rows is None else order.num_rows
    chosen, places = chosen[:total].sort(dim=1)
    weights = weights[:total].gather(1, places).float()
    count = chosen.shape[1]
    pairs = chosen.flatten().argsort(stable=True)
    # One gather before and one behind all products: they cost more than small products do.
    gathered = hidden[pairs // count]
    products = torch.empty_like(gathered)
    start = 0
    for index, num_pairs in enumerate(
        torch.bincount(chosen.flatten(), minlength=experts.num_experts).tolist()
    ):
        while num_pairs > 0:
            size = min(num_pairs, tiles.rows_max)
            tile = gathered[start : start + size]
            if padding := tiles.padded(size) - size:
                tile = functional.pad(tile, (0, 0, 0, padding))
            inner = experts._apply_gate(expert_product(experts, "gate_up_proj", index, tile))
            product = expert_product(experts, "down_proj", index, inner)
            products[start : start + size] = product[:size]
            start += size
            num_pairs -= size
    results = torch.empty_like(products)
    results[pairs] = products
    shares = results.float().view(total, count, -1) * weights.unsqueeze(2)
    output = torch.zeros_like(hidden)
    summed = shares[:, 0]
    for place in range(1, count):
        summed = summed + shares[:, place]
    output[:total] = summed.to(hidden.dtype)
    return output


def _in_tiles(
    forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], tiles: RowTiles
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """A router's forward for passes of few rows: they are padded to a tile.

    Longer ones are prefill chunks, which are always run in their first shape.
    """

    def padded(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        count = rows.shape[0]
        if count > tiles.rows_max:
            return forward(rows)
        padding = tiles.padded(count) - count
        return tuple(part[:count] for part in forward(functional.pad(rows, (0, 0, 0, padding))))

    return padded


def _parents(blocks: Iterable[torch.nn.Module]) -> list[Any]:
    return [
        module
        for block in blocks
        for module in block.modules()
        if isinstance(getattr(module, _EXPERTS, None), torch.nn.Module)
    ]


def _router_of(parent: torch.nn.Module) -> torch.nn.Module | None:
    for name in _ROUTERS:
        router = getattr(parent, name, None)
        if isinstance(router, torch.nn.Module):
            return router
    return None
