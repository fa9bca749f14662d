"""A frozen model with something to learn: prompt, LoRA, a head for classes, or several.

An ordinary torch module whose parameters are what is learned. Prompts stand before every
row and are cut off again; padding stands behind and never reaches a server.
Shapes: B rows, S columns, P positions of the prompt, D hidden size, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from shoal.base.adapters import DropoutKey
from shoal.base.errors import BadInput, ConfigError
from shoal.hf.tuning_base import LoraPass, Pass, TuningBase
from shoal.hf.tuning_examples import IGNORED, Batch
from shoal.hf.tuning_methods import ClassHead, DeepPromptTuning, Lora, PromptTuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a pass over a batch gave."""

    total: torch.Tensor
    """The sum over all predictions that count, a scalar; differentiable."""
    num_counted: int
    num_right: int = 0
    """Classes that were told right; 0 for texts."""
    scores: torch.Tensor | None = None
    """(B, C) of classes."""


class TunedModel(torch.nn.Module):
    """What is learned, put into the passes of a base."""

    def __init__(
        self,
        base: TuningBase,
        *,
        prompt: PromptTuning | None = None,
        lora: Lora | None = None,
        classes: ClassHead | None = None,
    ) -> None:
        """Raises ConfigError when there is nothing to learn, or a size doesn't fit."""
        super().__init__()
        if prompt is None and lora is None and classes is None:
            raise ConfigError("nothing to learn: give a prompt, LoRA or a head for classes")
        if prompt is not None and prompt.prompt.shape[1] != base.hidden_size:
            raise ConfigError(
                f"a prompt {prompt.prompt.shape[1]} wide for a model {base.hidden_size} wide"
            )
        self.prompt = prompt
        self.lora = lora
        self.classes = classes
        # In a tuple: torch would take the frozen model for something to learn.
        self._base = (base,)

    @property
    def base(self) -> TuningBase:
        """The frozen model."""
        return self._base[0]

    @property
    def num_prompt_tokens(self) -> int:
        """P; 0 without a prompt."""
        return 0 if self.prompt is None else self.prompt.num_tokens

    def states(
        self,
        ids: torch.Tensor,
        lengths: tuple[int, ...],
        *,
        dropout: DropoutKey | None = None,
    ) -> torch.Tensor:
        """(B, P + S, D) hidden states behind the final norm, those of the prompt first.

        `dropout` is what LoRA's dropout is drawn from, of use in training mode only: another
        one for every pass.

        Raises:
            BadInput: lengths that are none, a token outside the vocabulary.
            NoRouteError, PeerError: the swarm could not do it.
        """
        return self.base.states(*self._entering(ids, lengths, dropout))

    def logits(self, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """(B, S, V) float32 scores of next tokens, or (B, C) of classes."""
        states = self.states(ids, lengths)
        if self.classes is not None:
            found: torch.Tensor = self.classes(_last(states, lengths, self.num_prompt_tokens))
            return found
        return self.base.scores(states[:, self.num_prompt_tokens :])

    def forward(self, batch: Batch, dropout: DropoutKey | None = None) -> Loss:
        """The loss of a batch. Through a swarm, gradients of a text's loss come with it."""
        if self.classes is None:
            return self._text_loss(batch, dropout)
        states = self.states(batch.ids, batch.lengths, dropout=dropout)
        scores = self.classes(_last(states, batch.lengths, self.num_prompt_tokens))
        total = functional.cross_entropy(scores, batch.labels, reduction="sum")
        right = int((scores.argmax(dim=1) == batch.labels).sum())
        return Loss(total=total, num_counted=len(batch.labels), num_right=right, scores=scores)

    def _text_loss(self, batch: Batch, dropout: DropoutKey | None) -> Loss:
        # The state before a token predicts it. Behind a prompt even the first token is
        # predicted, as in peft.
        wanted = functional.pad(batch.labels, (self.num_prompt_tokens, 1), value=IGNORED)[:, 1:]
        total = self.base.loss(*self._entering(batch.ids, batch.lengths, dropout), wanted)
        return Loss(total=total, num_counted=int((wanted != IGNORED).sum()))

    def _entering(
        self, ids: torch.Tensor, lengths: tuple[int, ...], dropout: DropoutKey | None
    ) -> tuple[torch.Tensor, Pass]:
        """(B, P + S, D) embeddings, and what the pass does besides."""
        rows, columns = int(ids.shape[0]), int(ids.shape[1])
        if len(lengths) != rows or not all(1 <= length <= columns for length in lengths):
            raise BadInput(f"lengths {lengths} for {rows} rows of {columns} columns")
        embeddings = self.base.embed(ids)
        if self.prompt is not None:
            prompt = self.prompt.prompt.to(embeddings.dtype)
            embeddings = torch.cat([prompt.expand(rows, -1, -1), embeddings], dim=1)
        lora = None
        if self.lora is not None:
            lora = LoraPass(
                config=self.lora.config,
                pairs=self.lora.pairs(),
                dropout=dropout if self.training else None,
            )
        given = Pass(
            lengths=tuple(length + self.num_prompt_tokens for length in lengths),
            deep=self.prompt.deep() if isinstance(self.prompt, DeepPromptTuning) else None,
            lora=lora,
        )
        return embeddings, given


def _last(states: torch.Tensor, lengths: tuple[int, ...], prompt: int) -> torch.Tensor:
    """(B, D) states of each row's last token."""
    rows = torch.arange(len(lengths))
    return states[rows, torch.tensor(lengths) + prompt - 1]
