"""Generating behind a learned prompt: its positions are tokens beyond the vocabulary.

Token V + i stands for position i of the prompt, where V is the vocabulary's size. So a log
of token ids stays all that a session needs to be sent again, and answers are saved, resumed
and repaired as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.hf.head import Head


class PromptedHead:
    """A head that also embeds the positions of one prompt."""

    def __init__(self, head: Head, prompt: torch.Tensor) -> None:
        """`prompt` is (P, D).

        Raises:
            ConfigError: of another width than the model.
        """
        if prompt.dim() != 2 or prompt.shape[1] != head.hidden_size:
            raise ConfigError(
                f"a prompt of shape {tuple(prompt.shape)} for a model {head.hidden_size} wide"
            )
        self._head = head
        self._prompt = prompt.detach()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that stand for the prompt."""
        first = self._head.vocab_size
        return tuple(range(first, first + len(self._prompt)))

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """As `Head.embed`.

        Raises:
            BadInput: no tokens, or one that is neither in the vocabulary nor in the prompt.
        """
        if not token_ids:
            raise BadInput("no tokens to embed")
        parts, at, first = [], position, self._head.vocab_size
        for is_prompt, run in groupby(token_ids, key=lambda token: token >= first):
            ids = list(run)
            if is_prompt:
                if max(ids) >= first + len(self._prompt):
                    raise BadInput(f"token {max(ids)} is beyond vocabulary and prompt")
                chosen = self._prompt[[token - first for token in ids]]
                parts.append(self._head.embed_given(chosen, encoding, at))
            else:
                parts.append(self._head.embed(ids, encoding, at))
            at += len(ids)
        return b"".join(parts)

    def logits(self, rows: bytes | bytearray | memoryview, encoding: str) -> torch.Tensor:
        """As `Head.logits`: (S, V); the prompt's tokens have no scores."""
        return self._head.logits(rows, encoding)
