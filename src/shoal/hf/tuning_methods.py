"""What is learned, as torch modules: prompts, deep prompts, LoRA, a head for classes.

They are parameters and nothing else: any torch optimiser takes them, and `TunedModel`
(`tuning_model.py`) puts them where they belong in a pass.
Shapes: P positions of a prompt, L blocks, D hidden size, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from shoal.base.adapters import AdapterConfig
from shoal.base.errors import ConfigError
from shoal.base.training import PROMPT_TOKENS_MAX as DEEP_TOKENS_MAX
from shoal.hf.tuning_base import LoraPairs
from shoal.model.lora import LoraPair

PROMPT_TOKENS_MAX: Final = 4096
"""Longer than any prompt that was ever tuned; a slip of the finger otherwise."""


class PromptTuning(torch.nn.Module):
    """Embeddings that stand before every text (Lester et al. 2021)."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        """(P, D) values to begin with; `prompt_from_tokens` gives good ones.

        Raises:
            ConfigError: no positions, or far too many.
        """
        super().__init__()
        _check_length(int(embeddings.shape[0]))
        self.prompt = torch.nn.Parameter(embeddings.detach().clone().float())

    @property
    def num_tokens(self) -> int:
        """P."""
        return int(self.prompt.shape[0])


class DeepPromptTuning(PromptTuning):
    """A prompt, and for every block after the first what is added to its positions.

    Begins as prompt tuning does: the additions are 0.
    """

    def __init__(self, embeddings: torch.Tensor, num_blocks: int) -> None:
        """(P, D) values to begin with.

        Raises:
            ConfigError: no positions, or more than servers take.
        """
        check_deep_length(int(embeddings.shape[0]))
        super().__init__(embeddings)
        # Of no use to a model of one block: a row all the same, so that files have one shape.
        self.additions = torch.nn.Parameter(torch.zeros(max(1, num_blocks - 1), *embeddings.shape))
        self._num_blocks = num_blocks

    def deep(self) -> torch.Tensor:
        """(L, P, D) additions; those of block 0 are 0: the prompt itself enters there."""
        first = torch.zeros_like(self.additions[:1])
        return torch.cat([first, self.additions])[: self._num_blocks]


class Lora(torch.nn.Module):
    """Low-rank additions to linear layers inside the blocks (Hu et al. 2021).

    B begins at 0, so that the model begins unchanged.
    """

    def __init__(
        self,
        config: AdapterConfig,
        layers: Mapping[int, Mapping[str, tuple[int, int]]],
        generator: torch.Generator,
    ) -> None:
        """`layers` are (inputs, outputs) by block and path: `TuningBase.linear_layers`.

        Raises:
            ConfigError: a target that no block has; names those there are.
        """
        super().__init__()
        self.config = config
        self._keys = _chosen(config, layers)
        self.a = torch.nn.ParameterList()
        self.b = torch.nn.ParameterList()
        for block, target in self._keys:
            inputs, outputs = layers[block][target]
            # As peft: Kaiming's uniform with a = sqrt(5), whose bound is 1 / sqrt(inputs).
            bound = 1.0 / math.sqrt(inputs)
            drawn = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
            self.a.append(torch.nn.Parameter(drawn))
            self.b.append(torch.nn.Parameter(torch.zeros(outputs, config.rank)))

    def pairs(self) -> LoraPairs:
        """The parameters themselves, by block and path."""
        found: dict[int, dict[str, LoraPair]] = {}
        for (block, target), a, b in zip(self._keys, self.a, self.b, strict=True):
            found.setdefault(block, {})[target] = LoraPair(a, b)
        return found


class ClassHead(torch.nn.Module):
    """Scores of classes from the state of a text's last token, as transformers has it."""

    def __init__(self, num_classes: int, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.empty(num_classes, hidden_size).normal_(0.0, 0.02, generator=generator)
        self.weight = torch.nn.Parameter(drawn)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, C) scores of (B, D) states."""
        return torch.nn.functional.linear(states.to(self.weight.dtype), self.weight)


def prompt_from_tokens(
    table: torch.Tensor, num_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """(P, D): embeddings of tokens drawn from the first 5,000 of the vocabulary.

    Frequent tokens come first in most vocabularies, and prompts that begin at real
    embeddings learn faster than those that begin at noise (Lester et al. 2021, section 3.2).
    """
    _check_length(num_tokens)
    drawn = torch.randint(0, min(5000, len(table)), (num_tokens,), generator=generator)
    return table[drawn].detach().clone().float()


def check_deep_length(num_tokens: int) -> None:
    """See that servers take a deep prompt of so many positions.

    Raises:
        ConfigError: they don't.
    """
    if num_tokens > DEEP_TOKENS_MAX:
        raise ConfigError(
            f"a deep prompt of {num_tokens} positions: servers take at most {DEEP_TOKENS_MAX}"
        )


def _check_length(num_tokens: int) -> None:
    if not 1 <= num_tokens <= PROMPT_TOKENS_MAX:
        raise ConfigError(f"a prompt of {num_tokens} positions: give from 1 to {PROMPT_TOKENS_MAX}")


def _chosen(
    config: AdapterConfig, layers: Mapping[int, Mapping[str, tuple[int, int]]]
) -> tuple[tuple[int, str], ...]:
    known = sorted({target for block in layers.values() for target in block})
    for target in config.targets:
        if target not in known:
            raise ConfigError(f"no block has a linear layer {target!r}: it has {', '.join(known)}")
    return tuple(
        (block, target)
        for block in sorted(layers)
        for target in config.targets
        if target in layers[block]
    )
