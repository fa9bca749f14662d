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
        self._made: tuple[int, int, bytes] | None = None
        """A row that was checked and not sent yet: position, count, bytes."""

    def append(self, token_ids: Sequence[int]) -> None:
        """Tokens for the positions after the last one."""
        self._ids.extend(token_ids)

    def rows(self, position: int, count: int) -> bytes:
        """The rows of positions [position, position + count).

        They are asked for twice, to be checked and to be sent: a single row is kept in between.
        """
        made, self._made = self._made, None
        if made is not None and made[:2] == (position, count):
            return made[2]
        start = position - self._first_position
        rows = self._head.embed(self._ids[start : start + count], self._encoding, position)
        self._made = (position, count, rows) if count == 1 else None
        return rows
