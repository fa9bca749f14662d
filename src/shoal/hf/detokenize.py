"""Text from tokens while they arrive, never a broken character."""

from __future__ import annotations

from typing import Any, Final

_BROKEN: Final = "�"
"""What a decoder writes for bytes that are no whole character (yet)."""


class Detokenizer:
    """Feed tokens, get pieces of text; all pieces together are the decoded whole.

    A token may be part of a character: its text is held back until the rest arrives. Only
    a window of recent tokens is decoded each time, so the cost doesn't grow with the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._window_start = 0
        self._shown_until = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty for parts of characters."""
        self._ids.append(token_id)
        before = self._decode(self._window_start, self._shown_until)
        now = self._decode(self._window_start, len(self._ids))
        if now.endswith(_BROKEN) or len(now) <= len(before) or not now.startswith(before):
            return ""
        # The window starts with the tokens shown last: some decoders treat the first
        # token of a text differently, so new tokens always need one before them.
        self._window_start, self._shown_until = self._shown_until, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """The rest: whatever was held back, broken characters included."""
        before = self._decode(self._window_start, self._shown_until)
        now = self._decode(self._window_start, len(self._ids))
        self._window_start = self._shown_until = len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end],
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text
