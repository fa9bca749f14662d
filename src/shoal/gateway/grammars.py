"""JSON schemas as rules for the next token, by llguidance.

A schema becomes a matcher in a thread, with bounds on the work that it may cause; then a
mask takes some 0.1 ms a token.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from shoal.base.errors import BadOutput
from shoal.gateway.errors import ApiError

KEPT_MAX: Final = 64
"""Schemas that stay ready; programs send the same ones again and again."""


class Grammar:
    """The rules of one answer. Not for two answers."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def bits(self) -> bytes:
        """A bit for each token that may come next.

        Raises:
            BadOutput: the grammar's bounds were reached.
        """
        bits: bytes = self._matcher.compute_bitmask()
        self._check()
        return bits

    def take(self, token_id: int) -> None:
        """The answer has one token more.

        Raises:
            BadOutput: one that was not allowed, or the grammar's bounds were reached.
        """
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can come."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadOutput(f"the answer's schema can't be followed: {self._matcher.get_error()}")


class Grammars:
    """Makes grammars for one model's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._end_ids = sorted(end_ids)
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = asyncio.Lock()

    async def open(self, schema: str, param: str) -> Grammar:
        """The rules of a JSON schema.

        Raises:
            ApiError: 400: no schema, or one that can't be followed; says why.
        """
        async with self._lock:  # one at a time: they take a core
            matcher = self._kept.get(schema)
            if matcher is None:
                matcher = await asyncio.to_thread(self._build, schema, param)
                self._kept[schema] = matcher
                if len(self._kept) > KEPT_MAX:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(schema)
        return Grammar(matcher.deep_copy())

    def _build(self, schema: str, param: str) -> LLMatcher:
        if self._tokens is None:
            self._tokens = self._read_tokens(param)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", code="invalid_schema", param=param) from error
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ApiError(
                400, f"{param}: this schema can't be followed: {_first_line(matcher.get_error())}",
                code="invalid_schema", param=param,
            )  # fmt: skip
        return matcher

    def _read_tokens(self, param: str) -> LLTokenizer:
        try:
            return from_tokenizer(
                self._tokenizer, self._vocab_size, eos_token=self._end_ids or None
            )
        except (ValueError, RuntimeError) as error:
            raise ApiError(
                400, f"this model's tokenizer can't be constrained: {error}", param=param
            ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"
