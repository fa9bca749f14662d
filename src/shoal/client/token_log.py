"""What a session of tokens keeps to send again: ids, not rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Embedding(Protocol):
    """Makes the rows of tokens: see `shoal.base.head.HeadBackend`."""

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The rows of these tokens as bytes; the first is at `position`."""


class TokenLog:
    """Token ids of one session by position; makes their rows when they are sent."""

    def __init__(self, head: Embedding, encoding: str, first_position: int) -> None:
        self._head = head
        self._encoding = encoding
        self._first_position = first_position
        self._ids: list[int] = []

    def append(self, token_ids: Sequence[int]) -> None:
        """Tokens for the positions after the last one."""
        self._ids.extend(token_ids)

    def rows(self, position: int, count: int) -> bytes:
        """The rows of positions [position, position + count)."""
        start = position - self._first_position
        return self._head.embed(self._ids[start : start + count], self._encoding, position)
