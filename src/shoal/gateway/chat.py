"""Chat answers: text and tool calls, whole or streamed."""

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
    call_object,
    chat_logprobs,
    done_facts,
    recovery_facts,
    usage,
)
from shoal.gateway.tools import CallReader, FoundCall, Way, read_forced


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """How a request wants its answer."""

    envelope: Envelope
    num_choices: int
    way: Way | None
    """How to find tool calls; None: there are none to find."""
    is_call_forced: bool
    has_logprobs: bool
    text_of: Callable[[int], str]
    new_id: Callable[[], str]
    """For tool calls."""


class _Choice:
    """Text and calls of one choice."""

    def __init__(self, form: ChatForm) -> None:
        self.calls: list[dict[str, Any]] = []
        self._form = form
        self._reader = None if form.way is None or form.is_call_forced else CallReader(form.way)
        self._forced: list[str] = []

    def take(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """New text, and calls that are complete."""
        text, calls = "", []
        for part in self._parts(piece):
            if isinstance(part, str):
                text += part
            else:
                calls.append(call_object(part, self._form.new_id()))
        self.calls += calls
        return text, calls

    def ending(self, piece: Piece) -> str | None:
        """OpenAI's finish_reason."""
        is_whole = piece.ending == "stop"
        return "tool_calls" if is_whole and self.calls else piece.ending

    def _parts(self, piece: Piece) -> Sequence[str | FoundCall]:
        if self._form.is_call_forced:
            self._forced.append(piece.text)
            return self._forced_call() if piece.ending is not None else ()
        if self._reader is None:
            return (piece.text,)
        found = self._reader.push(piece.text)
        return found if piece.ending is None else [*found, *self._reader.finish()]

    def _forced_call(self) -> Sequence[str | FoundCall]:
        text = "".join(self._forced)
        try:
            return read_forced(text)
        except ValueError:
            return (text,)  # cut at the limit: all there is


@dataclass(slots=True)
class _Written:
    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    ending: str | None = None


class ChatWhole:
    """Collects an answer. A `Sink`."""

    def __init__(self, form: ChatForm) -> None:
        self._form = form
        self._choices = [_Choice(form) for _ in range(form.num_choices)]
        self._written = [_Written() for _ in range(form.num_choices)]

    async def begun(self, begun: Begun) -> None:
        """Nothing is said before all is."""

    async def piece(self, piece: Piece) -> None:
        """More of one choice."""
        written, choice = self._written[piece.choice], self._choices[piece.choice]
        text, _ = choice.take(piece)
        written.text += text
        written.tokens += piece.tokens
        written.ending = choice.ending(piece)

    def object(self, done: Done) -> dict[str, Any]:
        """The whole response."""
        choices = [self._choice(index) for index in range(self._form.num_choices)]
        return self._form.envelope.wrap(choices, usage=usage([done]), shoal=done_facts(done))

    def _choice(self, index: int) -> dict[str, Any]:
        written, choice = self._written[index], self._choices[index]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": written.text if written.text or not choice.calls else None,
            "refusal": None,
        }
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = None
        if self._form.has_logprobs:
            logprobs = chat_logprobs(written.tokens, self._form.text_of)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": written.ending,
        }


class ChatStream:
    """Streams an answer. A `Sink`."""

    def __init__(self, form: ChatForm, stream: EventStream, *, has_usage: bool) -> None:
        self._form = form
        self._stream = stream
        self._choices = [_Choice(form) for _ in range(form.num_choices)]
        self._usage: dict[str, Any] = {"usage": None} if has_usage else {}

    async def begun(self, begun: Begun) -> None:
        """The status, and who speaks."""
        await self._stream.open()
        for index in range(self._form.num_choices):
            delta = {"role": "assistant", "content": ""}
            await self._send(index, delta, shoal=begun_facts(begun))

    async def piece(self, piece: Piece) -> None:
        """What is new; what may still become a call waits."""
        choice = self._choices[piece.choice]
        text, calls = choice.take(piece)
        more: dict[str, Any] = {}
        if piece.recoveries:
            more["shoal"] = {"recoveries": recovery_facts(piece.recoveries)}
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = len(choice.calls) - len(calls)
            delta["tool_calls"] = [{"index": first + at, **call} for at, call in enumerate(calls)]
        ending = choice.ending(piece)
        if not delta and ending is None and not more and not self._form.has_logprobs:
            return
        # Some clients take a chunk with text and an ending for an ending alone.
        if delta and ending is not None:
            await self._send(piece.choice, delta, tokens=piece.tokens, **more)
            await self._send(piece.choice, {}, ending=ending)
            return
        await self._send(piece.choice, delta, tokens=piece.tokens, ending=ending, **more)

    async def end(self, done: Done) -> None:
        """Usage, if it is wanted, and the end."""
        if self._usage:
            await self._stream.event(
                self._form.envelope.wrap([], usage=usage([done]), shoal=done_facts(done))
            )
        await self._stream.close()

    async def _send(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[ScoredToken] = (),
        ending: str | None = None,
        **more: Any,
    ) -> None:
        logprobs = None
        if self._form.has_logprobs and tokens:
            logprobs = chat_logprobs(tokens, self._form.text_of)
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": ending,
        }
        await self._stream.event(self._form.envelope.wrap([choice], **self._usage, **more))
