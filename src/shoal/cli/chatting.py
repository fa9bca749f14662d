"""The session behind a chat: one that goes on from turn to turn.

The servers keep the cache of what was said. For the next answer the chat template writes
the whole conversation anew; what its tokens have in common with those that the servers
hold is kept, the rest is truncated, and only new tokens are sent. Usually that is the new
question alone. Where the template writes an answer's tokens otherwise than the model chose
them, the tokens from there on are sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.base.errors import ConfigError, ShoalError
from shoal.cli.speakers import Speaker, SpokenSession
from shoal.hf.detokenize import Detokenizer
from shoal.hf.generation import Speed, Token, measure
from shoal.hf.sampling import Sampler

if TYPE_CHECKING:
    from shoal.client.session import Recovery

Messages = Sequence[dict[str, str]]
Render = Callable[[Messages], list[int]]
"""Messages as token ids, up to where the answer begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, whole or stopped."""

    text: str
    num_tokens: int
    prompt_tokens: int
    """Of the whole conversation."""
    kept_tokens: int
    """How many of them the servers held already."""
    speed: Speed
    is_stopped: bool
    """By `Conversation.stop`."""
    is_cut: bool
    """At the limit of new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who is told while an answer comes."""

    text: Callable[[str], None]
    """A piece of the answer."""
    repaired: Callable[[Recovery], None]
    """A server was replaced."""


class Conversation:
    """Answers, one after the other. One task at a time; `stop` from anywhere in the loop."""

    def __init__(
        self,
        speaker: Speaker,
        tokenizer: Any,
        render: Render,
        eos_ids: Collection[int],
    ) -> None:
        self.session: SpokenSession | None = None
        """What runs now; None before the first answer and after a failure."""
        self._speaker = speaker
        self._tokenizer = tokenizer
        self._render = render
        self._eos_ids = eos_ids
        self._held: list[int] = []
        """The tokens of the session's positions."""
        self._num_told = 0
        """Repairs of the session that the listener knows of."""
        self._answering: asyncio.Task[Any] | None = None
        self._is_stopping = False

    @property
    def is_answering(self) -> bool:
        """Whether an answer is coming."""
        return self._answering is not None

    async def answer(
        self,
        messages: Messages,
        sampler: Sampler,
        max_new_tokens: int,
        listener: Listener,
    ) -> Reply:
        """The model's answer to the last of `messages`.

        Stopped, it is what came until then, and the session stays. After an error the
        next answer begins a new session.

        Raises:
            ConfigError: the chat template refuses the conversation.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        self._answering, self._is_stopping = asyncio.current_task(), False
        ids = self._render(messages)
        if not ids:
            raise ConfigError("the chat template makes nothing of this conversation")
        kept = self._continue(ids)
        tokens: list[Token] = []
        pieces: list[str] = []
        started_s = asyncio.get_running_loop().time()

        def take(piece: str) -> None:
            pieces.append(piece)
            if piece:
                listener.text(piece)

        try:
            with self._failing_closes(), self._stopping() as stopped:
                detokenizer = Detokenizer(self._tokenizer)
                async for token in self._tokens(ids, kept, sampler, max_new_tokens, listener):
                    tokens.append(token)
                    take(detokenizer.push(token.id))
            take(detokenizer.finish())
        finally:
            self._answering = None
        return Reply(
            text="".join(pieces),
            num_tokens=len(tokens),
            prompt_tokens=len(ids),
            kept_tokens=kept,
            speed=measure(tokens, started_s),
            is_stopped=bool(stopped),
            is_cut=len(tokens) == max_new_tokens and tokens[-1].id not in self._eos_ids,
        )

    def stop(self) -> None:
        """End the answer that is coming, if one is."""
        if self._answering is not None and not self._is_stopping:
            self._is_stopping = True
            self._answering.cancel()

    def close(self) -> None:
        """End the session. Idempotent."""
        if self.session is not None:
            self.session.close()
        self.session, self._held = None, []

    def _continue(self, ids: Sequence[int]) -> int:
        """Make the session hold nothing but a beginning of `ids`; returns how long it is."""
        if self.session is None:
            self._held = []
            return 0
        kept = common_prefix(self._held, ids)
        self.session.truncate(kept)
        del self._held[kept:]
        return kept

    async def _tokens(
        self,
        ids: Sequence[int],
        kept: int,
        sampler: Sampler,
        max_new_tokens: int,
        listener: Listener,
    ) -> AsyncIterator[Token]:
        if self.session is None:
            self.session = await self._speaker.open_session()
            self._num_told = 0
        session = self.session
        self._held = list(ids)
        try:
            async for token in self._speaker.tokens(
                session,
                ids[kept:],
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                eos_ids=self._eos_ids,
            ):
                self._held.append(token.id)
                for recovery in session.recoveries[self._num_told :]:
                    listener.repaired(recovery)
                self._num_told = len(session.recoveries)
                yield token
        finally:
            # The last token, or all that were not sent yet when it was stopped.
            del self._held[session.length :]

    @contextmanager
    def _stopping(self) -> Iterator[list[bool]]:
        """Swallows the cancellation that `stop` makes, and only that; tells by a full list."""
        stopped: list[bool] = []
        try:
            yield stopped
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_stopping or task is None or task.uncancel():
                raise
            stopped.append(True)

    @contextmanager
    def _failing_closes(self) -> Iterator[None]:
        try:
            yield
        except ShoalError:
            self.close()
            raise


def common_prefix(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading tokens are equal; at most all of `ids` but one, which asks for rows."""
    limit = min(len(held), len(ids) - 1)
    return next((index for index in range(limit) if held[index] != ids[index]), limit)


def behind(ids_before: Sequence[int], render: Render) -> Render:
    """Renders the same behind these tokens: those of a learned prompt."""
    before = list(ids_before)
    return lambda messages: before + render(messages)


def template_renderer(tokenizer: Any, template: str | None) -> Render:
    """Renders with the tokenizer's chat template, or with this Jinja `template`.

    Raises:
        ConfigError: there is none; by the renderer: it refuses the conversation.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model has no chat template (it may not be made for chats): give one with "
            "--template FILE, or use shoal generate"
        )
    from jinja2 import TemplateError

    def render(messages: Messages) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template refuses the conversation: {error}") from error
        # The template writes special tokens itself.
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    return render
