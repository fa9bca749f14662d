"""A toy head: a token is a hash of the last row, so it stands for the whole past."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Final

from shoal.base.errors import BadInput
from shoal.base.head import Choosing, Chosen, HeadFacts
from shoal.lab.toy_blocks import HIDDEN_SIZE, encode_rows, toy_embedding
from shoal.wire.tensors import check_payload

VOCABULARY: Final = 1000


class ToyHead:
    """See `HeadBackend`. `numerics` is mixed in: heads of another class choose otherwise."""

    def __init__(self, numerics: str = "toy", *, vocab_size: int = VOCABULARY) -> None:
        self.facts = HeadFacts(vocab_size=vocab_size, encoding="float32", numerics=numerics)
        self.is_closed = False

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The toy rows of tokens."""
        if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < self.facts.vocab_size:
            raise BadInput(f"no tokens, or one outside the vocabulary of {self.facts.vocab_size}")
        return b"".join(encode_rows(toy_embedding(token), encoding) for token in token_ids)

    def begin(
        self, choosing: Choosing, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> _ToyTurn:
        """Choices that depend on all options, and with penalties on all tokens."""
        if any(not 0 <= token < self.facts.vocab_size for token, _ in choosing.bias):
            raise BadInput("a bias outside the vocabulary")
        return _ToyTurn(self.facts, choosing, prompt_ids, answer_ids)

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.is_closed = True


class _ToyTurn:
    def __init__(
        self,
        facts: HeadFacts,
        choosing: Choosing,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
    ) -> None:
        self._facts = facts
        self._choosing = choosing
        self._answer = list(answer_ids)
        self._prompt = sorted(set(prompt_ids))

    async def choose(
        self, row: bytes, encoding: str, position: int, allowed: bytes | None = None
    ) -> Chosen:
        """The token by a hash of everything that may matter."""
        check_payload(encoding, HIDDEN_SIZE, 1, len(row))
        options = self._choosing
        words: list[object] = [self._facts.numerics, row.hex(), options.bias]
        if options.temperature:
            words += [options.temperature, options.seed, position, options.top_k, options.top_p]
        if (options.repetition, options.presence, options.frequency) != (1.0, 0.0, 0.0):
            words += [options.repetition, options.presence, options.frequency]
            words += [self._prompt, sorted(self._answer)]
        digest = hashlib.blake2b(repr(words).encode(), digest_size=8, person=b"toy-choice").digest()
        token = int.from_bytes(digest, "little") % self._facts.vocab_size
        if allowed is not None:
            token = self._next_allowed(token, allowed)
        self._answer.append(token)
        if options.num_best is None:
            return Chosen(id=token)
        best = [((token + rank) % self._facts.vocab_size, -1.0 - rank) for rank in range(20)]
        return Chosen(id=token, chance=-1.0, best=tuple(best[: options.num_best]))

    def _next_allowed(self, token: int, allowed: bytes) -> int:
        size = self._facts.vocab_size
        for one in chain(range(token, size), range(token)):
            if one // 8 < len(allowed) and allowed[one // 8] >> (one % 8) & 1:
                return one
        raise BadInput("no token is allowed")
