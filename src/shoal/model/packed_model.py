"""A span model that runs rows of many sequences in one pass.

Shapes: T rows of a pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from shoal.base.spans import Span
from shoal.model.latent_attention import latent_of, use_latent_attention
from shoal.model.lora_pass import LoraRun, lora_running
from shoal.model.onednn_linear import OneDnnLinear, use_onednn
from shoal.model.packed_attention import PackedStep, Piece, use_packed_attention
from shoal.model.span_model import SpanModel
from shoal.model.tiled_experts import TiledExperts
from shoal.model.training_attention import TrainingStep


class PackedModel:
    """The blocks of a span behind packed attention. Takes the span model over."""

    def __init__(self, model: SpanModel) -> None:
        use_packed_attention(model.base.config)
        for block in model.blocks():
            use_latent_attention(block)
            use_onednn(block)
        self.span = model.span
        self.windows = model.windows
        self.dtype = model.dtype
        self.config = model.config
        self.hidden_size = int(model.config.hidden_size)
        self._model = model
        self.experts = TiledExperts(model.base.config, model.blocks())
        """Mixtures of experts, if there are any: exact mode computes them in tiles."""

    def run(
        self,
        pieces: Sequence[Piece],
        hidden: torch.Tensor,
        span: Span,
        num_rows: int = 0,
        lora: Sequence[LoraRun] = (),
    ) -> torch.Tensor:
        """(T, D) hidden states of the pieces, one after the other, behind the blocks of `span`.

        The pass has at least `num_rows` rows: zeros are added, their results dropped. Keys
        and values are written to the pieces' caches, nothing is committed. `lora` says which
        rows have adapters.
        """
        count = hidden.shape[0]
        padding = max(num_rows - count, 0)
        positions = [
            position
            for piece in pieces
            for position in range(piece.start, piece.start + piece.count)
        ] + [0] * padding
        step = PackedStep(self.windows, pieces)
        self.experts.num_rows = count
        with step.running(), lora_running(lora, count + padding):
            output = self._model.forward_at(
                functional.pad(hidden, (0, 0, 0, padding)) if padding else hidden,
                torch.tensor(positions, device=hidden.device),
                step,
                span,
            )
        return output[:count]

    def run_whole(self, hidden: torch.Tensor, lengths: Sequence[int], span: Span) -> torch.Tensor:
        """(T, D) of whole sequences behind the blocks of `span`; differentiable, without caches."""
        positions = torch.cat([torch.arange(length, device=hidden.device) for length in lengths])
        self.experts.num_rows = hidden.shape[0]
        step = TrainingStep(self.windows, lengths)
        with step.running():
            return self._model.forward_at(hidden, positions, step, span)

    @property
    def spans(self) -> SpanModel:
        """The span model that was taken over."""
        return self._model

    @property
    def kernels(self) -> str:
        """Whose linear layers these are, for numerics classes."""
        blocks = self._model.blocks()
        has_onednn = any(isinstance(m, OneDnnLinear) for block in blocks for m in block.modules())
        return "onednn" if has_onednn else "torch"

    def block_kinds(self) -> list[int]:
        """The first block of each kind: equal parameter shapes and windows are one kind."""
        return self._model.block_kinds()

    def modules(self, block: int) -> list[torch.nn.Module]:
        """The modules of one block that the rows of a pass go through together."""
        return list(self.named_modules(block).values())

    def named_modules(self, block: int) -> dict[str, torch.nn.Module]:
        """The same by their paths inside the block."""
        modules = dict(self._model.block(block).named_modules())
        by_row = [latent.product for module in modules.values() if (latent := latent_of(module))]
        return {name: module for name, module in modules.items() if module not in by_row}
