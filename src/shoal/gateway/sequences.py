"""One answer's sequence of tokens, whoever has the head: this process, or a server.

`Engine` reads a prompt, chooses a token, and goes on with it. Here a token costs a step of the
chain and a call of the head; at a head server it comes by itself, unless a grammar decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from shoal.base.head import Chosen
from shoal.client.chain_session import ChainSession
from shoal.client.thin_session import ThinSession, Wish
from shoal.client.waves import Waves
from shoal.gateway.answering import Writing
from shoal.hf.generation import Happened, RowScores, TokenHead, TokenLog

if TYPE_CHECKING:
    import torch

    from shoal.base.ids import SessionId
    from shoal.client.session import Move, Recovery
    from shoal.plan.view import Stage


DEPARTURE_TURNS: Final = 4
"""Turns of the loop in which rows that may leave now are on their way: task, turnstile, its answer,
the link's writer. What is written to readers comes after that."""


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
        """Have the token that was chosen run; the next choice waits for it.

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

    def __init__(
        self, session: ChainSession, head: TokenHead, batch: RowScores, waves: Waves
    ) -> None:
        super().__init__(session)
        self._head = head
        self._batch = batch
        self._waves = waves
        self._trip: asyncio.Task[bytes] | None = None
        """Sends the last token when it is its turn, and brings its row."""
        self._log = TokenLog(head, session.encoding, session.length)
        self._scores: torch.Tensor | None = None
        """(V,) of the position behind the last one; None: its row is under way, or was cut off."""

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""
        self._session.truncate(length)
        self._log = TokenLog(self._head, self._session.encoding, length)
        self._scores = None

    async def fork(self, length: int | None = None) -> ChainSequence:
        """A second sequence."""
        session = await self._session.fork(length)
        child = ChainSequence(session, self._head, self._batch, self._waves)
        child._scores = self._scores if length is None else None
        return child

    def close(self) -> None:
        """Free it."""
        self._rest()
        self._session.close()

    def _rest(self) -> None:
        trip, self._trip = self._trip, None
        if trip is not None and not trip.cancel() and not trip.cancelled():
            trip.exception()  # nobody waits for it any more; the session tells of it as well
        self._waves.leave(self.id)

    async def read(self, ids: Sequence[int]) -> None:
        """Run tokens, and the head on the last one's row."""
        self._send(ids)
        await self._take_scores()

    async def choose(self, writing: Writing) -> None:
        """The next token, chosen here."""
        scores = self._scores
        if scores is None:
            scores = await self._take_scores()
        writing.choose(scores, self._session.length)

    async def go_on(self, token_id: int) -> None:
        """Send the token, at once or in its turn; those that leave together share a frame."""
        if self._waves.may_leave(self._session):
            self._send([token_id])
            await asyncio.sleep(0)  # lets the writer of the link go first
            return
        self._scores = None
        self._trip = asyncio.ensure_future(self._go_round(token_id))
        for _ in range(DEPARTURE_TURNS):
            await asyncio.sleep(0)

    async def _go_round(self, token_id: int) -> bytes:
        await self._waves.turn(self._session)
        self._send([token_id])
        return await self._row()

    def _send(self, ids: Sequence[int]) -> None:
        self._scores = None
        self._log.append(ids)
        self._session.append(self._log.rows, len(ids))

    async def _take_scores(self) -> torch.Tensor:
        trip, self._trip = self._trip, None
        row = await (self._row() if trip is None else trip)
        scores = self._scores = await self._batch.logits(row, self._session.encoding)
        return scores

    async def _row(self) -> bytes:
        end = self._session.length
        row = await self._session.rows(end - 1, end)
        self._waves.came(self.id)
        return row

    async def end(self) -> None:
        """Nobody waits for its rows any more."""
        self._rest()


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
