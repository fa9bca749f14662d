"""One answer's text, token by token: what is chosen, what may be shown, when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.base.errors import BadOutput
from shoal.base.head import Choosing, Chosen
from shoal.gateway.grammars import Grammar
from shoal.gateway.requests import Settings
from shoal.gateway.stops import StopScanner
from shoal.hf.detokenize import Detokenizer
from shoal.hf.score_rules import ScoreRules, TokenChances, chances, masked
from shoal.hf.thin_generation import choosing_of

if TYPE_CHECKING:
    from shoal.client.session import Recovery

Ending = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token of an answer."""

    id: int
    chances: TokenChances | None
    """If they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What comes of one choice at a time."""

    choice: int
    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    """Those whose text is in here, and those without any before them."""
    ending: Ending | None = None
    """Set in the last piece."""
    recoveries: tuple[Recovery, ...] = ()
    """Repairs since the last piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is needed to write tokens."""

    tokenizer: Any
    end_ids: Collection[int]
    vocab_size: int
    keeps_special: bool = False
    """Whether special tokens are shown: some families write calls with them."""


class Writing:
    """One choice of one answer, from its first token to its last."""

    def __init__(
        self,
        choice: int,
        words: Words,
        settings: Settings,
        prompt_ids: Sequence[int],
        max_tokens: int,
        grammar: Grammar | None,
    ) -> None:
        """Raises BadInput for a bias on a token that does not exist."""
        self.tokens: list[int] = []
        self.ending: Ending | None = None
        self._choice = choice
        self.end_ids = frozenset() if settings.ignores_end else frozenset(words.end_ids)
        self._num_best = settings.num_best
        self._max_tokens = max_tokens
        self._sampler = settings.sampler(choice)
        self._options = settings.options
        self._rules = ScoreRules(settings.options, prompt_ids, words.vocab_size)
        self._grammar = grammar
        self._scanner = StopScanner(settings.stops)
        self._detokenizer = Detokenizer(
            words.tokenizer, skip_special_tokens=not words.keeps_special
        )
        self._untold: list[ScoredToken] = []

    @property
    def num_tokens(self) -> int:
        """Chosen so far."""
        return len(self.tokens)

    @property
    def tokens_left(self) -> int:
        """How many more may come."""
        return self._max_tokens - len(self.tokens)

    @property
    def choosing(self) -> Choosing:
        """The request's options, for a head elsewhere."""
        options = self._options
        return replace(
            choosing_of(self._sampler),
            repetition=options.repetition,
            presence=options.presence,
            frequency=options.frequency,
            bias=tuple(options.bias.items()),
            num_best=self._num_best,
        )

    def allowed(self) -> bytes | None:
        """Bits of the tokens that the schema allows next; None: there is none.

        Raises:
            BadOutput: the schema can't be followed any further.
        """
        return None if self._grammar is None else self._grammar.bits()

    def choose(self, scores: torch.Tensor, position: int) -> None:
        """The token at `position`, by the model's (V,) scores and the request's options.

        Raises:
            BadInput: the options make a score NaN.
            BadOutput: the model did, or the schema can't be followed any further.
        """
        if bool(torch.isnan(scores).any()):
            raise BadOutput(f"the model's scores of position {position} are not numbers")
        wanted = self._rules.apply(scores)
        if self._grammar is not None:
            wanted = masked(wanted, self._grammar.bits())
        token_id = self._sampler.choose(wanted, position)
        told = None if self._num_best is None else chances(scores, token_id, self._num_best)
        self._rules.add(token_id)
        self._add(token_id, told)

    def take(self, chosen: Chosen) -> None:
        """A token that was chosen elsewhere, by `choosing`."""
        is_told = chosen.chance is not None
        self._add(
            chosen.id,
            TokenChances(chosen=chosen.chance or 0.0, best=chosen.best) if is_told else None,
        )

    def _add(self, token_id: int, told: TokenChances | None) -> None:
        self.tokens.append(token_id)
        if token_id not in self.end_ids:
            self._untold.append(ScoredToken(id=token_id, chances=told))

    def write(self) -> Piece | None:
        """What the last token completes; None: nothing yet. Sets `ending` at the end."""
        token_id = self.tokens[-1]
        is_end = token_id in self.end_ids
        text = "" if is_end else self._scanner.push(self._detokenizer.push(token_id))
        if self._grammar is not None and not is_end:
            self._grammar.take(token_id)
            is_end = self._grammar.is_complete
        if is_end or self._scanner.is_stopped:
            return self.end("stop", text)
        if len(self.tokens) >= self._max_tokens:
            return self.end("length", text)
        return self._piece(text) if text else None

    def end(self, ending: Ending, text: str = "") -> Piece:
        """The last piece, with what was held back."""
        if not self._scanner.is_stopped:
            text += self._scanner.push(self._detokenizer.finish())
            text += self._scanner.finish()
        self.ending = "stop" if self._scanner.is_stopped else ending
        return self._piece(text)

    def _piece(self, text: str) -> Piece:
        told, self._untold = tuple(self._untold), []
        return Piece(choice=self._choice, text=text, tokens=told, ending=self.ending)


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """A token's own text, as logprobs name it."""

    def text(token_id: int) -> str:
        found: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return found

    return text
