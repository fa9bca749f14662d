"""The HeadBackend contract: what a server that answers for thin clients needs of a head.

Tokens in, rows for block 0 out; a row of the last block in, a token out. Rows are opaque
bytes here. Implementations: the torch head in `shoal.hf.served_head`, a toy in
`shoal.lab.toy_head`. Both pass tests/contracts/test_head.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

BEST_MAX: Final = 20
"""Likeliest tokens that are told per position, as in OpenAI's API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """How tokens are chosen. The defaults are greedy and change no score."""

    temperature: float = 0.0
    seed: int = 0
    """The random number of a position depends on this and the position alone."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition: float = 1.0
    """Above 1: tokens that were there already become less likely."""
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its score)."""
    num_best: int | None = None
    """Tell the log-probability of each token and of so many others; None: of none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One token."""

    id: int
    chance: float | None = None
    """Natural logarithm of the model's own probability, before any option; None: not asked."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFacts:
    """What a head is. Constant for its life."""

    vocab_size: int
    encoding: str
    """Its own dtype's."""
    numerics: str
    """Heads with equal classes choose the same token from the same row."""


class HeadTurn(Protocol):
    """One answer's choices, from its first token to its last."""

    async def choose(
        self, row: bytes, encoding: str, position: int, allowed: bytes | None = None
    ) -> Chosen:
        """The token at `position` of the sequence, from the row before it; it is counted.

        `allowed` has a bit for each token (lowest first) that may be chosen; None: all may.
        Company and time don't change the choice.

        Raises:
            BadInput: not one row, or an unknown encoding.
            BadOutput: scores that are not numbers.
        """


class HeadBackend(Protocol):
    """Embeds tokens and chooses them, for many sequences at once. One event loop."""

    @property
    def facts(self) -> HeadFacts:
        """What this head is."""

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The tokens' rows for block 0, in `encoding`; the first token is at `position`.

        Raises:
            BadInput: no tokens, one outside the vocabulary, an unknown encoding.
        """

    def begin(
        self, choosing: Choosing, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> HeadTurn:
        """Choices after a prompt and the answer so far, which penalties look at.

        Raises:
            BadInput: an option that can't be, or a token outside the vocabulary.
        """

    async def aclose(self) -> None:
        """Stop threads, free memory."""
