"""Who makes the tokens of an answer: this process with a head of its own, or a server with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Protocol

from shoal.client.client import Client
from shoal.client.thin import ThinClient
from shoal.hf.generation import Happened, Token, TokenHead, generate
from shoal.hf.sampling import Sampler
from shoal.hf.thin_generation import generate_thin
from shoal.plan.view import SwarmView


class SpokenSession(Happened, Protocol):
    """A sequence of tokens, wherever its head is."""

    @property
    def length(self) -> int:
        """Positions so far."""

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""

    def close(self) -> None:
        """Free it."""

    async def __aenter__(self) -> SpokenSession:
        """Itself."""

    async def __aexit__(self, *exc: object) -> None:
        """Free it."""


class Speaker(Protocol):
    """Opens sessions and makes their tokens."""

    async def open_session(self) -> SpokenSession:
        """A session without tokens.

        Raises:
            NoRouteError, PeerError: the swarm could not do it.
        """

    def tokens(
        self,
        session: Any,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        eos_ids: Collection[int] = (),
        past_ids: Sequence[int] = (),
    ) -> AsyncIterator[Token]:
        """New tokens of a session of ours; see `shoal.hf.generation.generate`."""

    def view(self) -> SwarmView:
        """The servers of the model that are known now."""


class ChainSpeaker:
    """Embeds and chooses here. A `Speaker`."""

    def __init__(
        self,
        client: Client,
        head: TokenHead,
        encoding: str,
        inner_encoding: str | None = None,
        adapter: bytes = b"",
    ) -> None:
        self._client = client
        self._head = head
        self._encoding = encoding
        self._inner_encoding = inner_encoding
        self._adapter = adapter

    async def open_session(self) -> SpokenSession:
        """A session along a chain."""
        return await self._client.open_session(
            self._encoding, inner_encoding=self._inner_encoding, adapter=self._adapter
        )

    def tokens(
        self,
        session: Any,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        eos_ids: Collection[int] = (),
        past_ids: Sequence[int] = (),
    ) -> AsyncIterator[Token]:
        """New tokens, chosen here."""
        return generate(
            session, self._head, prompt_ids, max_new_tokens=max_new_tokens, sampler=sampler,
            eos_ids=eos_ids, past_ids=past_ids,
        )  # fmt: skip

    def view(self) -> SwarmView:
        """The servers of the model."""
        return self._client.view()


class ThinSpeaker:
    """Asks servers with a head. A `Speaker`."""

    def __init__(self, client: ThinClient, adapter: bytes = b"") -> None:
        self._client = client
        self._adapter = adapter

    async def open_session(self) -> SpokenSession:
        """A session at a head server."""
        return await self._client.open_session(self._adapter)

    def tokens(
        self,
        session: Any,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        eos_ids: Collection[int] = (),
        past_ids: Sequence[int] = (),
    ) -> AsyncIterator[Token]:
        """New tokens, chosen there."""
        return generate_thin(
            session, prompt_ids, max_new_tokens=max_new_tokens, sampler=sampler,
            eos_ids=eos_ids, past_ids=past_ids,
        )  # fmt: skip

    def view(self) -> SwarmView:
        """The servers of the model."""
        return self._client.view()
