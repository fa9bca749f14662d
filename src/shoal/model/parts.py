"""The parts of transformers' model object: found by name, emptied, given their tables.

Shared by spans (which keep blocks) and heads (which keep everything else).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, initialization

from shoal.base.errors import ModelUnsupported
from shoal.model.families import Family, family_of


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """transformers' causal language model for `config`, without memory, in eval mode.

    It has a config of its own: engines choose their attention there. Weights are not tied.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ModelUnsupported(
            f"transformers cannot build architecture {config.model_type!r}: {error}"
        ) from error
    return model.eval()


class Parts:
    """Where the parts of one model object are. Names end without a dot.

    Raises:
        ModelUnsupported: the model has no blocks, norm or embedding where its family has.
    """

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.family: Family = family_of(whole.config)
        self._core_name = _joined(_name_in(whole, whole.base_model), self.family.core)
        self.core: Any = self._module(self.family.core, whole.base_model)
        self.blocks: Any = self._of_core(self.family.blocks)
        self.embedding: Any = self._of_core(self.family.embedding)
        self.norm: Any = self._of_core(self.family.norm)
        self.embedding_norm: Any = self._optional(self.family.embedding_norm)
        self.positions: Any = self._optional(self.family.positions)
        self.head: Any = whole.get_output_embeddings()
        if self.head is None:
            raise ModelUnsupported(f"{self._what()} has no language-model head")

    @property
    def blocks_name(self) -> str:
        """Prefix of the blocks' weights."""
        return _joined(self._core_name, self.family.blocks)

    def name_of(self, path: str) -> str:
        """Prefix of the weights of the part at `path` of the core."""
        return _joined(self._core_name, path)

    def head_name(self) -> str:
        """Prefix of the head's weights."""
        return _name_in(self.whole, self.head)

    def pass_through(self, kept: set[int]) -> dict[int, Any]:
        """A stand-in for each block that isn't in `kept`: returns its input."""
        return {
            index: PassThrough(block, self.family.returns_tuples)
            for index, block in enumerate(self.blocks)
            if index not in kept
        }

    def neutralise_ends(self) -> None:
        """Make everything before the first and behind the last block return its input."""
        family = self.family
        setattr(self.core, family.embedding, torch.nn.Identity())
        self.neutralise_norm()
        if family.embedding_norm:
            setattr(self.core, family.embedding_norm, torch.nn.Identity())
        if family.positions:
            setattr(self.core, family.positions, _NoPositions())
        if family.embedding_multiplier:
            setattr(self.core, family.embedding_multiplier, 1.0)

    def neutralise_norm(self) -> None:
        """Make the final norm return its input."""
        if self.norm is not None:
            setattr(self.core, self.family.norm, torch.nn.Identity())

    def _of_core(self, path: str) -> Any:
        try:
            return self.core.get_submodule(path)
        except AttributeError as error:
            if hasattr(self.core, path):
                return getattr(self.core, path)
            raise ModelUnsupported(f"{self._what()} has no part {path!r}: {error}") from error

    def _optional(self, path: str) -> Any:
        return self._of_core(path) if path else None

    def _module(self, path: str, root: Any) -> Any:
        return root.get_submodule(path) if path else root

    def _what(self) -> str:
        return f"architecture {self.whole.config.model_type!r}"


class PassThrough:
    """Stands for a block that isn't held: hidden states come out as they went in.

    Models look at attributes of their blocks between calls: those are the block's own.
    """

    def __init__(self, block: torch.nn.Module, returns_tuple: bool) -> None:
        self._block = block
        self._returns_tuple = returns_tuple

    def __call__(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, None) if self._returns_tuple else hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class _NoPositions(torch.nn.Module):
    """In place of learned positions, which the client has added already."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def fill_tables(whole: Any, root: torch.nn.Module, device: str) -> None:
    """Compute what `root` holds besides weights (rotary tables), which meta left empty.

    transformers' own initialisation does it. It runs twice over different garbage: what
    comes out different was not set.

    Raises:
        ModelUnsupported: a table that transformers doesn't know how to compute.
    """
    owners = _empty_buffers(root)
    results: list[dict[str, torch.Tensor]] = []
    for garbage in (0, 1):
        for owner, names in owners.items():
            for name in names:
                shape_of = owner._buffers[name]
                assert shape_of is not None
                owner._buffers[name] = torch.full_like(shape_of, garbage, device=device)
            with torch.no_grad(), initialization.guard_torch_init_functions():
                _protect_weights(owner)
                _initialiser(whole, owner)._init_weights(owner)
        results.append(
            {
                f"{type(owner).__name__}.{name}": owner._buffers[name].clone()  # type: ignore[union-attr]
                for owner, names in owners.items()
                for name in names
            }
        )
    for name, first in results[0].items():
        if not torch.equal(first, results[1][name]):
            raise ModelUnsupported(
                f"architecture {whole.config.model_type!r}: cannot compute the table {name}"
            )


def _empty_buffers(root: torch.nn.Module) -> dict[torch.nn.Module, list[str]]:
    owners: dict[torch.nn.Module, list[str]] = {}
    for module in root.modules():
        names = [name for name, buffer in module._buffers.items() if _is_empty(buffer)]
        if names:
            owners[module] = names
    return owners


def _is_empty(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.is_meta


def _protect_weights(module: torch.nn.Module) -> None:
    """transformers' initialisation leaves tensors alone that carry its flag."""
    for weight in module.parameters(recurse=False):
        weight._is_hf_initialized = True  # type: ignore[attr-defined]


def _initialiser(whole: Any, owner: torch.nn.Module) -> Any:
    """The innermost transformers model around `owner`: it knows how to initialise it."""
    models = [m for m in whole.modules() if hasattr(m, "_init_weights")]
    around = [m for m in models if any(child is owner for child in m.modules())]
    return around[-1] if around else whole


def check_nothing_on_meta(root: torch.nn.Module) -> None:
    """Prove that all weights and tables of `root` have values.

    Raises:
        ModelUnsupported: one has none.
    """
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.is_meta:
            raise ModelUnsupported(f"{name} was left without values after loading")


def _name_in(whole: Any, part: torch.nn.Module) -> str:
    modules: dict[str, torch.nn.Module] = dict(whole.named_modules())
    return next(name for name, child in modules.items() if child is part)


def _joined(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second
