"""Which stored tensors make which weights of a model, and filling modules from them.

Checkpoints don't always hold weights as transformers' modules do: names change between
versions, experts are stored one by one and run fused. transformers' own conversion table
says what becomes of each stored tensor; this module applies it to the modules that are
asked for, and reads nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shoal.base.errors import ModelCorrupt
from shoal.model.source import ModelSource


@dataclass(slots=True)
class _Recipe:
    """What makes one weight (or, for a converter with several targets, several)."""

    converter: Any = None
    """transformers' WeightConverter; None: the stored tensor is the weight."""
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """Stored names by the converter's pattern, in the order of their numbers."""

    def stored_names(self) -> list[str]:
        return [name for names in self.inputs.values() for name in names]


Filled = Callable[[str], None]


class Checkpoint:
    """The stored tensors of a source, seen as the weights of one (meta) model."""

    def __init__(self, whole: Any, source: ModelSource) -> None:
        self._source = source
        self._config = whole.config
        self._whole = whole
        expected: dict[str, torch.Tensor] = whole.state_dict()
        self._dtypes = _DtypePlan(whole)
        self._recipes = _plan(whole, expected, source.tensor_names())

    def stored_names(self, prefix: str) -> list[str]:
        """The source's tensors that the weights called `prefix` + ... are made of."""
        names = [
            name
            for target, recipe in self._recipes.items()
            if target.startswith(prefix)
            for name in recipe.stored_names()
        ]
        return sorted(names)

    def has(self, target: str) -> bool:
        """Whether the source holds the weight called `target`."""
        return target in self._recipes

    def fill(
        self, module: torch.nn.Module, prefix: str, device: str, filled: Filled | None = None
    ) -> None:
        """Give a meta module its weights: those called `prefix` + own name.

        `filled` is called with each part of the module (its path) when all of the part's own
        weights are there, and may replace it: what it makes smaller is small before the next
        tensor is read.

        Raises:
            ModelCorrupt: a tensor is missing or has a wrong shape.
        """
        expected = module.state_dict()
        missing = Counter(_owner(name) for name in expected)
        done: set[str] = set()
        for name in expected:
            if name in done:
                continue
            made = self._made(prefix + name, prefix, expected, device)
            while made:
                own, owner = _place(module, prefix, *made.popitem())
                done.add(own)
                missing[owner] -= 1
                if not missing[owner] and filled is not None:
                    filled(owner)  # nobody here holds its tensors any more

    def _made(
        self, target: str, prefix: str, expected: Mapping[str, torch.Tensor], device: str
    ) -> dict[str, torch.Tensor]:
        """`target`, and what is made together with it, in its dtype on `device`."""
        recipe = self._recipes.get(target) or self._sibling_recipe(target)
        if recipe is None:
            raise ModelCorrupt(f"the model's files lack the tensor {target}")
        if recipe.converter is None:
            (name,) = recipe.stored_names()
            made = {target: self._source.read(name)}
        elif _is_fused_experts(recipe.converter):
            like = expected[target.removeprefix(prefix)]
            made = {target: self._fused_experts(recipe, target, like)}
        else:
            made = self._converted(recipe, target)
        result = {}
        for name, tensor in made.items():
            like = expected[name.removeprefix(prefix)]
            if tensor.shape != like.shape:
                raise ModelCorrupt(
                    f"{name} has shape {tuple(tensor.shape)}, the config says {tuple(like.shape)}"
                )
            dtype = self._dtypes.of(name, like.dtype)
            result[name] = tensor.detach().to(device=device, dtype=dtype)
        return result

    def _sibling_recipe(self, target: str) -> _Recipe | None:
        """The recipe of a converter that makes `target` beside the weight it is filed under."""
        for filed, recipe in self._recipes.items():
            if recipe.converter is None or len(recipe.converter.target_patterns) == 1:
                continue
            first, *others = recipe.converter.target_patterns
            if any(filed.replace(first, other, 1) == target for other in others):
                return recipe
        return None

    def _fused_experts(self, recipe: _Recipe, target: str, like: torch.Tensor) -> torch.Tensor:
        """(experts, rows, columns): written expert by expert, so that no second copy exists."""
        fused = torch.empty(like.shape, dtype=self._dtypes.of(target, like.dtype))
        row = 0
        for pattern in recipe.converter.source_patterns:
            names = recipe.inputs.get(pattern, [])
            if len(names) != like.shape[0]:
                raise ModelCorrupt(
                    f"{target} is made of {like.shape[0]} experts, the files hold {len(names)}"
                )
            rows = 0
            for expert, name in enumerate(names):
                tensor = self._source.read(name)
                rows = tensor.shape[0]
                place = fused[expert, row : row + rows]
                if place.shape != tensor.shape:
                    raise ModelCorrupt(
                        f"{name} has shape {tuple(tensor.shape)}, the config says "
                        f"{tuple(place.shape)}"
                    )
                place.copy_(tensor)
            row += rows
        return fused

    def _converted(self, recipe: _Recipe, target: str) -> dict[str, torch.Tensor]:
        converter = deepcopy(recipe.converter)
        for pattern, names in recipe.inputs.items():
            for name in names:
                converter.add_tensor(target, name, pattern, self._source.read(name))
        made = converter.convert(target, model=self._whole, config=self._config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }


class _DtypePlan:
    """The dtype of each weight: the model's, but for the few that stay float32."""

    def __init__(self, whole: Any) -> None:
        plan = whole._get_dtype_plan(whole.dtype)
        self._float32 = tuple(plan)

    def of(self, target: str, dtype: torch.dtype) -> torch.dtype:
        parts = target.split(".")
        if dtype.is_floating_point and any(part in parts for part in self._float32):
            return torch.float32
        return dtype


def _place(
    module: torch.nn.Module, prefix: str, target: str, tensor: torch.Tensor
) -> tuple[str, str]:
    """Put one weight where it belongs; its name in the module, and the path of its part."""
    own = target.removeprefix(prefix)
    owner = _owner(own)
    part = module.get_submodule(owner)
    part.load_state_dict({own.rpartition(".")[2]: tensor}, strict=False, assign=True)
    part.requires_grad_(False)
    return own, owner


def _owner(name: str) -> str:
    """The path of the part that has a weight."""
    return name.rpartition(".")[0]


def _is_fused_experts(converter: Any) -> bool:
    """Whether it only stacks experts, and perhaps joins gate and up rows."""
    operations = [(type(o), getattr(o, "dim", None)) for o in converter.operations]
    return len(converter.target_patterns) == 1 and operations in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    )


def _plan(
    whole: Any, expected: Mapping[str, torch.Tensor], stored: Iterable[str]
) -> dict[str, _Recipe]:
    mapping = get_model_conversion_mapping(whole)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = whole.base_model_prefix
    recipes: dict[str, _Recipe] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected:
            # Not to be renamed after all, as in transformers; perhaps without the prefix.
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            continue
        if pattern is None:
            recipes[target] = _Recipe(inputs={name: [name]})
        else:
            recipe = recipes.setdefault(target, _Recipe(converter=by_pattern[pattern]))
            recipe.inputs.setdefault(pattern, []).append(name)
    return recipes
