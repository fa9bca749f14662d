"""From scores to a token: greedy, or seeded sampling that a repair can't disturb.

The random number of a position depends on (seed, position) alone, not on how many were
drawn before or by which library: a session that is replayed samples the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import torch

from shoal.base.errors import BadInput, ConfigError

_UNIFORM_BITS: Final = 53
"""As many as a double holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Chooses tokens. `temperature` 0 is greedy and needs no seed."""

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    """Only the k best tokens."""
    top_p: float | None = None
    """Only the best tokens that together reach this probability."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """The token at `position` (its index in the whole sequence), given its (V,) scores.

        Raises:
            BadInput: a score is NaN.
        """
        if bool(torch.isnan(logits).any()):
            raise BadInput(f"the scores of position {position} are not numbers")
        if self.temperature == 0.0:
            return int(torch.argmax(logits))
        scores, tokens = torch.sort(
            logits.to(torch.float64) / self.temperature, descending=True, stable=True
        )
        sums = torch.cumsum(torch.softmax(scores, dim=-1), dim=-1)
        kept = self._num_kept(sums)
        # Inverse of the distribution function over the kept tokens, best first.
        target = self._uniform(position) * float(sums[kept - 1])
        index = int(torch.searchsorted(sums[:kept], target, right=True))
        return int(tokens[min(index, kept - 1)])

    def _num_kept(self, sums: torch.Tensor) -> int:
        kept = sums.shape[0]
        if self.top_k is not None:
            kept = min(kept, self.top_k)
        if self.top_p is not None:
            share = self.top_p * float(sums[kept - 1])
            kept = min(kept, int(torch.searchsorted(sums[:kept], share)) + 1)
        return kept

    def _uniform(self, position: int) -> float:
        """In [0, 1), the same on every machine."""
        text = f"{self.seed}:{position}".encode()
        digest = hashlib.blake2b(text, digest_size=8, person=b"shoal-sample").digest()
        return (int.from_bytes(digest, "little") >> (64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)
