"""What a request asks to be done to the scores of a row before a token is chosen.

Repetition penalty as Keskar et al. 2019 (CTRL) and transformers have it, over prompt and
answer; presence and frequency penalties as OpenAI defines them, over the answer alone.
Shapes: V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from shoal.base.errors import BadInput

_BITS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """The defaults change nothing."""

    repetition: float = 1.0
    """Above 1: tokens that were there already become less likely."""
    presence: float = 0.0
    """Taken from the score of each token of the answer, once."""
    frequency: float = 0.0
    """The same, as often as it is in the answer."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these tokens."""

    @property
    def is_plain(self) -> bool:
        """Whether scores stay as they are."""
        return (self.repetition, self.presence, self.frequency) == (1.0, 0.0, 0.0) and not self.bias


class ScoreRules:
    """Applies options to one sequence's scores, token by token."""

    def __init__(
        self,
        options: ScoreOptions,
        prompt_ids: Sequence[int],
        vocab_size: int,
        answer_ids: Sequence[int] = (),
    ) -> None:
        """Takes 5 bytes per token of the vocabulary, unless the options are plain.

        `answer_ids` is the answer so far, if there is one: an `add` each takes 9 us.

        Raises:
            BadInput: a bias on a token outside the vocabulary.
        """
        self._options = options
        if options.is_plain:
            return
        strange = [token for token in options.bias if not 0 <= token < vocab_size]
        if strange:
            raise BadInput(f"token {strange[0]} is outside the vocabulary of {vocab_size}")
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[_tensor(prompt_ids)] = True
        answer = _tensor(answer_ids)
        self._seen[answer] = True
        self._counts = torch.bincount(answer, minlength=vocab_size).to(torch.float32)
        self._bias_ids = torch.tensor(list(options.bias), dtype=torch.long)
        self._bias = torch.tensor(list(options.bias.values()), dtype=torch.float32)

    def add(self, token_id: int) -> None:
        """The answer has one token more."""
        if not self._options.is_plain:
            self._counts[token_id] += 1
            self._seen[token_id] = True

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """(V,) scores as asked for; the given ones stay as they are."""
        options = self._options
        if options.is_plain:
            return scores
        if options.repetition != 1.0:
            factor = options.repetition
            punished = torch.where(scores > 0, scores / factor, scores * factor)
            scores = torch.where(self._seen, punished, scores)
        scores = (
            scores
            - options.frequency * self._counts
            - options.presence * (self._counts > 0).to(scores.dtype)
        )
        if options.bias:
            scores[self._bias_ids] += self._bias
        return scores


def _tensor(ids: Sequence[int]) -> torch.Tensor:
    """(N,) int64; `torch.tensor` of a list takes eight times as long (32,768 ids: 3 ms)."""
    if not ids:
        return torch.zeros(0, dtype=torch.long)
    return torch.frombuffer(array("q", ids), dtype=torch.long)


def masked(scores: torch.Tensor, bits: bytes) -> torch.Tensor:
    """(V,) scores with -inf where a token's bit (lowest first) is 0 or missing."""
    flags = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    allowed = ((flags.unsqueeze(1) >> torch.arange(_BITS, dtype=torch.uint8)) & 1).flatten()
    size = min(allowed.shape[0], scores.shape[0])
    result = torch.full_like(scores, -torch.inf)
    chosen = allowed[:size].to(torch.bool)
    result[:size][chosen] = scores[:size][chosen]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChances:
    """What the model thought of a position, before any option."""

    chosen: float
    """Natural logarithm of the probability of the token that was chosen."""
    best: tuple[tuple[int, float], ...]
    """Likeliest tokens with theirs, best first."""


def chances(scores: torch.Tensor, token_id: int, num_best: int) -> TokenChances:
    """Log-probabilities by the model's own (V,) scores."""
    logs = torch.log_softmax(scores.to(torch.float32), dim=-1)
    found = torch.topk(logs, min(num_best, logs.shape[0]))
    best = tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return TokenChances(chosen=float(logs[token_id]), best=best)
