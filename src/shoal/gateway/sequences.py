"""One answer's sequence of tokens, whoever has the head: this process, or a server.

`Engine` reads a prompt, chooses a token, and goes on with it. Here a token costs a step of the
chain and a call of the head; at a head server it comes by itself, unless a grammar decides.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from shoal.base.head import Chosen
from shoal.client.chain_session import ChainSession
from shoal.client.thin_session import ThinSession, Wish
from shoal.gateway.answering import Writing
from shoal.hf.generation import Happened, RowScores, TokenHead, TokenLog

if TYPE_CHECKING:
    import torch

    from shoal.base.ids import SessionId
    from shoal.client.session import Move, Recovery
    from shoal.plan.view import Stage


class TokenSequence(Happened, Protocol):
    """A session at servers, in tokens. Not for two tasks at once."""

    @property
    def id(self) -> SessionId:
        """Which one."""

    @property
    def length(self) -> int:
        """Positions so far."""

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""

    async def fork(self, length: int | None = None) -> TokenSequence:
        """A second sequence with our first `length` positions (default: all, and what follows)."""

    def close(self) -> None:
        """Free it. Idempotent."""

    async def read(self, ids: Sequence[int]) -> None:
        """Run tokens of a prompt.

        Raises:
            ShoalError: the swarm could not do it.
        """

    async def choose(self, writing: Writing) -> None:
        """The next token of `writing`, by what was read.

        Raises:
            BadInput, BadOutput: no token can be chosen.
            ShoalError: the swarm could not do it.
        """

    async def go_on(self, token_id: int) -> None:
        """Run the token that was chosen.

        Raises:
            ShoalError: the swarm could not do it.
        """

    async def end(self) -> None:
        """No more tokens are wanted for now."""


S = TypeVar("S", ChainSession, ThinSession)


class _OfSession(Generic[S]):
    """What a sequence tells of the session behind it."""

    def __init__(self, session: S) -> None:
        self._session: S = session
        self.id = session.id

    @property
    def length(self) -> int:
        """Positions so far."""
        return self._session.length

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Who runs which blocks now."""
        return self._session.chain

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The repairs so far, of head servers too."""
        return self._session.recoveries

    @property
    def moves(self) -> tuple[Move, ...]:
        """The planned changes so far."""
        return self._session.moves

    @property
    def numerics(self) -> str:
        """What repairs did to the numbers."""
        return self._session.numerics


class ChainSequence(_OfSession[ChainSession]):
    """The head is here. See `TokenSequence`."""

    def __init__(self, session: ChainSession, head: TokenHead, batch: RowScores) -> None:
        super().__init__(session)
        self._head = head
        self._batch = batch
        self._log = TokenLog(head, session.encoding, session.length)
        self._scores: torch.Tensor | None = None
        """(V,) of the position behind the last one."""

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""
        self._session.truncate(length)
        self._log = TokenLog(self._head, self._session.encoding, length)
        self._scores = None

    async def fork(self, length: int | None = None) -> ChainSequence:
        """A second sequence."""
        child = ChainSequence(await self._session.fork(length), self._head, self._batch)
        child._scores = self._scores if length is None else None
        return child

    def close(self) -> None:
        """Free it."""
        self._session.close()

    async def read(self, ids: Sequence[int]) -> None:
        """Run tokens, and the head on the last one's row."""
        self._scores = None
        self._log.append(ids)
        row = await self._session.step(self._log.rows, len(ids))
        self._scores = await self._batch.logits(row, self._session.encoding)

    async def choose(self, writing: Writing) -> None:
        """The next token, chosen here."""
        if self._scores is None:
            raise RuntimeError("nothing was read")
        writing.choose(self._scores, self._session.length)

    async def go_on(self, token_id: int) -> None:
        """Run the token."""
        await self.read([token_id])

    async def end(self) -> None:
        """Nothing is under way between tokens."""


class ThinSequence(_OfSession[ThinSession]):
    """A server has the head. See `TokenSequence`."""

    def __init__(self, session: ThinSession) -> None:
        super().__init__(session)
        self._coming: AsyncGenerator[Chosen, None] | None = None
        self._unsent: int | None = None
        """A token that was chosen and is not in the session yet."""

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""
        self._session.truncate(length)

    async def fork(self, length: int | None = None) -> ThinSequence:
        """A second sequence."""
        child = await self._session.fork(length)
        try:
            if length is None:
                await child.read()  # there, before our own answer goes on
        except BaseException:
            child.close()
            raise
        return ThinSequence(child)

    def close(self) -> None:
        """Free it."""
        self._session.close()

    async def read(self, ids: Sequence[int]) -> None:
        """Have tokens run."""
        self._session.append(ids)
        await self._session.read()

    async def choose(self, writing: Writing) -> None:
        """The next token, from the server."""
        allowed = writing.allowed()
        if self._coming is None:
            wish = Wish(
                count=1 if allowed is not None else writing.tokens_left,
                choosing=writing.choosing,
                answer_start=self._session.length + (self._unsent is not None) - writing.num_tokens,
                end_ids=writing.end_ids,
                allowed=allowed,
            )
            if self._unsent is not None:
                self._session.append([self._unsent])
            self._coming = self._session.tokens(wish)
        self._unsent = None
        writing.take(await anext(self._coming))
        if allowed is not None:
            await self.end()

    async def go_on(self, token_id: int) -> None:
        """It goes by itself; where a grammar decides, with the next question."""
        if self._coming is None:
            self._unsent = token_id

    async def end(self) -> None:
        """Stop what is under way."""
        coming, self._coming = self._coming, None
        if coming is not None:
            await coming.aclose()
