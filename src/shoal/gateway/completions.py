"""Completions: the text after a prompt, of one or several prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.gateway.answering import Piece, ScoredToken
from shoal.gateway.engine import Begun, Done
from shoal.gateway.http import EventStream
from shoal.gateway.objects import (
    Envelope,
    begun_facts,
    completion_logprobs,
    done_facts,
    recovery_facts,
    usage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionForm:
    """How a request wants its answers."""

    envelope: Envelope
    echoes: Sequence[str]
    """What each choice's text begins with: its prompt, or nothing."""
    has_logprobs: bool
    text_of: Callable[[int], str]


@dataclass(slots=True)
class _Written:
    text: str
    tokens: list[ScoredToken] = field(default_factory=list)
    ending: str | None = None


class CompletionWhole:
    """Collects all choices of all prompts. A `Sink`, by way of `Part`."""

    def __init__(self, form: CompletionForm) -> None:
        self._form = form
        self._written = [_Written(echo) for echo in form.echoes]

    async def begun(self, first: int, begun: Begun) -> None:
        """Nothing is said before all is."""

    async def piece(self, index: int, piece: Piece) -> None:
        """More of one choice."""
        written = self._written[index]
        written.text += piece.text
        written.tokens += piece.tokens
        written.ending = piece.ending

    def object(self, dones: Sequence[Done]) -> dict[str, Any]:
        """The whole response."""
        choices = [
            {
                "index": index,
                "text": written.text,
                "logprobs": self._logprobs(written),
                "finish_reason": written.ending,
            }
            for index, written in enumerate(self._written)
        ]
        return self._form.envelope.wrap(choices, usage=usage(dones), shoal=done_facts(dones[0]))

    def _logprobs(self, written: _Written) -> dict[str, Any] | None:
        if not self._form.has_logprobs:
            return None
        return completion_logprobs(written.tokens, self._form.text_of, 0)


class CompletionStream:
    """Streams all choices of all prompts. A `Sink`, by way of `Part`."""

    def __init__(self, form: CompletionForm, stream: EventStream, *, has_usage: bool) -> None:
        self._form = form
        self._stream = stream
        self._usage: dict[str, Any] = {"usage": None} if has_usage else {}
        self._echoes = list(form.echoes)
        self._lengths = [0] * len(form.echoes)
        self._begun: dict[int, dict[str, Any]] = {}
        """What is to be said of a prompt with its first choice's first text."""

    async def begun(self, first: int, begun: Begun) -> None:
        """The status, when the first prompt is computed."""
        self._begun[first] = begun_facts(begun)
        if not self._stream.is_open:
            await self._stream.open()

    async def piece(self, index: int, piece: Piece) -> None:
        """What is new."""
        more: dict[str, Any] = {}
        facts = self._begun.pop(index, {})
        if piece.recoveries:
            facts["recoveries"] = recovery_facts(piece.recoveries)
        if facts:
            more["shoal"] = facts
        logprobs = None
        if self._form.has_logprobs and piece.tokens:
            logprobs = completion_logprobs(piece.tokens, self._form.text_of, self._lengths[index])
        self._lengths[index] += len(piece.text)
        echo, self._echoes[index] = self._echoes[index], ""
        choice = {
            "index": index,
            "text": echo + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.ending,
        }
        await self._stream.event(self._form.envelope.wrap([choice], **self._usage, **more))

    async def end(self, dones: Sequence[Done]) -> None:
        """Usage, if it is wanted, and the end."""
        if self._usage:
            await self._stream.event(
                self._form.envelope.wrap([], usage=usage(dones), shoal=done_facts(dones[0]))
            )
        await self._stream.close()


class Part:
    """One prompt's choices among all. A `Sink`."""

    def __init__(self, whole: CompletionWhole | CompletionStream, first: int) -> None:
        self._whole = whole
        self._first = first

    async def begun(self, begun: Begun) -> None:
        """The prompt is computed."""
        await self._whole.begun(self._first, begun)

    async def piece(self, piece: Piece) -> None:
        """More of one of its choices."""
        await self._whole.piece(self._first + piece.choice, piece)
