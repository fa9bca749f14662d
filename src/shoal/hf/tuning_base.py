"""What tuning needs of a frozen model, wherever its blocks are.

`SwarmBase` (`tuning_swarm.py`) has them at servers, `WholeBase` (`tuning_whole.py`) in this
process: the same numbers, one the proof of the other. What is learned (`tuning_methods.py`)
is handed to each pass.
Shapes: B rows, S positions, P positions of a prompt, L blocks, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from shoal.base.adapters import AdapterConfig, DropoutKey
from shoal.model.lora import LoraPair, stacked_weights_of
from shoal.model.parts import Parts

LoraPairs = Mapping[int, Mapping[str, LoraPair]]
"""LoRA by block and by a layer's path in the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPass:
    """The adapter of one pass, and what its dropout is drawn from."""

    config: AdapterConfig
    pairs: LoraPairs
    """float32 tensors, which may want gradients."""
    dropout: DropoutKey | None
    """None: no dropout, whatever the config says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass does besides running the blocks."""

    lengths: tuple[int, ...]
    """Positions of each row, prompts included; what is behind them is padding."""
    deep: torch.Tensor | None = None
    """(L, P, D): added to the first P positions where they enter each block."""
    lora: LoraPass | None = None


def stacked_weights(parts: Parts) -> tuple[str, ...]:
    """Paths in the blocks of weights that experts share in one tensor."""
    found = {name for block in parts.blocks for name in stacked_weights_of(block)}
    return tuple(sorted(found))


class TuningBase(Protocol):
    """A frozen model that gradients flow through."""

    @property
    def num_blocks(self) -> int:
        """L."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def model_name(self) -> str:
        """The model's hash."""

    def token_table(self) -> torch.Tensor:
        """(V, D) embeddings of all tokens, in the model's dtype."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) float32 token embeddings as they are looked up.

        Raises:
            BadInput: a token outside the vocabulary.
        """

    def states(self, embeddings: torch.Tensor, given: Pass) -> torch.Tensor:
        """(B, S, D) hidden states behind the final norm; gradients flow to what is learned.

        Raises:
            BadInput: shapes that don't fit.
            NoRouteError, PeerError: the swarm could not do it.
        """

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores of states behind the final norm, differentiable."""

    def loss(self, embeddings: torch.Tensor, given: Pass, wanted: torch.Tensor) -> torch.Tensor:
        """The sum of -log p(wanted) over all positions of which a token is wanted, a scalar.

        Args:
            embeddings: (B, S, D).
            given: as for `states`.
            wanted: (B, S) ids of the tokens that come next; `IGNORED` where none counts, and
                where padding is.

        Raises:
            BadInput: shapes that don't fit.
            NoRouteError, PeerError: the swarm could not do it.
        """

    def linear_layers(self) -> Mapping[int, Mapping[str, tuple[int, int]]]:
        """(inputs, outputs) of each block's linear layers by their path in the block."""

    def stacked_weights(self) -> tuple[str, ...]:
        """Paths in the blocks of weights that experts share in one tensor: they take no LoRA."""
