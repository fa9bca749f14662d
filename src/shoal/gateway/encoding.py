"""Conversations and prompts as token ids, off the event loop.

Long prompts take a good part of a second. The thread has a tokenizer of its own: the one
that writes answers is used on the event loop meanwhile.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from shoal.gateway.errors import ApiError
from shoal.gateway.requests import Talk
from shoal.gateway.tools import Way, find_way

T = TypeVar("T")


class Encoder:
    """Makes token ids. Close it when done."""

    def __init__(self, tokenizer: Any, template: str | None, limit_tokens: int) -> None:
        """`template` in place of the model's own; `limit_tokens` is what a session holds."""
        self._tokenizer = copy.deepcopy(tokenizer)
        own = getattr(tokenizer, "chat_template", None)
        self._template = template or (own if isinstance(own, str) else None)
        self._given = template
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._limit_tokens = limit_tokens
        self._chars_max = limit_tokens * longest
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gateway encoder")

    @property
    def way(self) -> Way | None:
        """How the model writes tool calls."""
        return None if self._template is None else find_way(self._template)

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    async def talk(self, talk: Talk) -> list[int]:
        """A conversation, up to where the answer begins.

        Raises:
            ApiError: 400: no template, one that refuses it, or too long for any session.
        """
        if self._template is None:
            raise ApiError(
                400, "this model has no chat template: use /v1/completions, or start the "
                "gateway with --template FILE",
            )  # fmt: skip
        if talk.tools and "tools" not in self._template:
            raise ApiError(400, "this model's chat template knows no tools", param="tools")
        return await self._run(lambda: self._ids(self._render(talk), has_special=True))

    async def text(self, text: str) -> list[int]:
        """A text as it is, with the tokens that the model wants around texts.

        Raises:
            ApiError: 400: empty, or too long for any session.
        """
        ids = await self._run(lambda: self._ids(text, has_special=False))
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return ids

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _render(self, talk: Talk) -> str:
        from jinja2 import TemplateError

        extras = {name: value for name, value in talk.extras.items() if _is_harmless(name, value)}
        if len(extras) != len(talk.extras):
            raise ApiError(
                400, "chat_template_kwargs: simple values, and no options of the library",
                param="chat_template_kwargs",
            )  # fmt: skip
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(talk.messages),
                tools=list(talk.tools) or None,
                chat_template=self._given,
                tokenize=False,
                add_generation_prompt=True,
                **extras,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ApiError(
                400, f"the chat template refuses the conversation: {error}", param="messages"
            ) from error
        return text

    def _ids(self, text: str, *, has_special: bool) -> list[int]:
        if len(text) > self._chars_max:
            raise ApiError(
                400, f"{len(text)} characters can't be {self._limit_tokens} tokens, which is all "
                "that this model's context holds: shorten the prompt",
                code="context_length_exceeded", param="messages" if has_special else "prompt",
            )  # fmt: skip
        # A template writes special tokens itself.
        found = self._tokenizer(text, add_special_tokens=not has_special)["input_ids"]
        return [int(token) for token in found]


def _is_harmless(name: str, value: Any) -> bool:
    """Not a template of their own, say: that would be their program on our processor."""
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    is_name = name.isidentifier() and name not in own and name not in ("messages", "tools")
    return is_name and isinstance(value, str | bool | int | float | None)
