"""Many answers at once over one client: sessions, prompts, tokens.

Each choice of each answer is a task that waits for its session's next row. Rows that came
in one frame wake their tasks in one turn of the event loop; the tasks ask `HeadBatch`, and
the head runs once for all of them. Nothing here waits for a slow reader but its own answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from shoal.base.errors import SessionTooLong, ShoalError
from shoal.gateway.answering import Piece, Words, Writing
from shoal.gateway.dispatch import EachForItself, Seats
from shoal.gateway.errors import ApiError, too_long
from shoal.gateway.grammars import Grammars
from shoal.gateway.kept import Kept, KeptSessions, Match
from shoal.gateway.meter import Meter
from shoal.gateway.requests import Settings
from shoal.gateway.sequences import TokenSequence
from shoal.plan.dispatching import Stages
from shoal.plan.view import Stage

if TYPE_CHECKING:
    from shoal.client.session import Recovery

ROOM_S: Final = 1.0
"""A session that is not open by then waits for cache: sessions at rest give theirs up."""

STALL_S: Final = 5.0
STALL_S_PER_TOKEN: Final = 0.1
"""A step that takes longer may wait for cache too. Slow swarms read 10 tokens a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that a swarm runs, as the gateway uses it."""

    open_sequence: Callable[[Stages], Awaitable[TokenSequence]]
    """A new one; it begins on the chain that is given, if that will do."""
    words: Words
    context_tokens: int
    """The longest session, prompt and answer."""
    seats: Seats = field(default_factory=EachForItself)
    """Where answers find a place."""
    open_adapted: Callable[[bytes], Awaitable[TokenSequence]] | None = None
    """The same with the LoRA adapter of this name; None: there are no adapters here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to answer."""

    owner: str
    """Whose sessions may be used again; those with an adapter are a set of their own."""
    prompt_ids: tuple[int, ...]
    settings: Settings
    keeps_special: bool = False
    """See `Words.keeps_special`."""
    adapter: bytes = b""
    """Name of the LoRA adapter that all tokens go through; empty: none."""
    param: str = "response_format"
    """What to name when the schema is no good."""
    on_used: Callable[[int], None] = lambda count: None
    """Told how many tokens were read and written, however it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The prompt is computed; tokens follow."""

    chain: tuple[Stage, ...]
    kept_tokens: int
    """Tokens of the prompt that the servers had already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How an answer came about."""

    prompt_tokens: int
    kept_tokens: int
    answer_tokens: int
    """Over all choices."""
    chain: tuple[Stage, ...]
    recoveries: tuple[Recovery, ...]
    numerics: str


class Sink(Protocol):
    """Who takes an answer. What it raises ends the answer."""

    async def begun(self, begun: Begun) -> None:
        """Called once, before the first piece."""

    async def piece(self, piece: Piece) -> None:
        """Called for each piece; of several choices, in turns."""


class Engine:
    """Answers jobs. One event loop, the client's own."""

    def __init__(
        self, served: Served, kept: KeptSessions, grammars: Grammars, meter: Meter
    ) -> None:
        self.served = served
        self._kept = kept
        self._grammars = grammars
        self._meter = meter
        self._clock = asyncio.get_running_loop().time

    def check_length(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many new tokens fit behind the prompt, or were asked for.

        Raises:
            ApiError: 400: too long.
        """
        limit = self.served.context_tokens
        if prompt_tokens + (max_tokens or 1) > limit:
            raise too_long(prompt_tokens, max_tokens or 0, limit)
        return max_tokens or limit - prompt_tokens

    async def answer(self, job: Job, sink: Sink) -> Done:
        """Compute an answer; cancelling it frees its sessions at once.

        Raises:
            ApiError: 400: too long, or a schema that can't be followed.
            BadInput: a token or a bias outside the vocabulary.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        started_s = self._clock()
        writings = await self._writings(job)
        async with self._sequence(job) as (session, kept_tokens):
            before = len(session.recoveries)
            rest = job.prompt_ids[kept_tokens:]
            try:
                await self._in_time(session.read(rest), len(rest))
                await sink.begun(Begun(chain=session.chain, kept_tokens=kept_tokens))
                self._meter.first_token_s.observe(self._clock() - started_s)
                forked = await self._write_all(session, writings, sink)
            finally:  # who leaves before the end has had them all the same
                job.on_used(len(job.prompt_ids) + sum(one.num_tokens for one in writings))
            recoveries = (*session.recoveries[before:], *forked)
            self._keep(job, session, writings[0].tokens)
            return self._done(job, session, kept_tokens, writings, recoveries)

    async def _writings(self, job: Job) -> list[Writing]:
        settings = job.settings
        max_tokens = self.check_length(len(job.prompt_ids), settings.max_tokens)
        words = replace(self.served.words, keeps_special=job.keeps_special)
        writings = []
        for choice in range(settings.num_choices):
            grammar = None
            if settings.schema is not None:
                grammar = await self._grammars.open(settings.schema, job.param)
            writings.append(Writing(choice, words, settings, job.prompt_ids, max_tokens, grammar))
        return writings

    # --- sessions ----------------------------------------------------------------------

    @asynccontextmanager
    async def _sequence(self, job: Job) -> AsyncIterator[tuple[TokenSequence, int]]:
        """A session that holds a beginning of the prompt; closed unless all goes well."""
        async with AsyncExitStack() as stack:
            session, kept_tokens = await self._begin(job, stack)
            try:
                yield session, kept_tokens
            except BaseException:
                session.close()
                raise

    async def _begin(self, job: Job, stack: AsyncExitStack) -> tuple[TokenSequence, int]:
        """The session, and how much of the prompt it holds; its place is in `stack`."""
        seats, count = self.served.seats, job.settings.num_choices
        match = self._kept.find(job.owner, job.prompt_ids, self._clock())
        if match is not None:
            found = await self._continued(match)
            if found is not None:
                stack.enter_context(seats.beside(found, count))
                return found, match.length
        seat = await stack.enter_async_context(seats.seat(count))
        session = await self._opened(seat.chain, job.adapter)
        seat.follow(session)
        return session, 0

    async def _continued(self, match: Match) -> TokenSequence | None:
        """The kept session, cut to what is in common; None: it failed while it was at rest."""
        session: TokenSequence = match.kept.session  # type: ignore[assignment]
        try:
            if match.is_fork:
                return await session.fork(match.length)
            session.truncate(match.length)
        except ShoalError:
            self._kept.drop(match.kept)
            return None
        return session

    async def _opened(self, chain: Stages, adapter: bytes) -> TokenSequence:
        if adapter and self.served.open_adapted is not None:
            opening = asyncio.ensure_future(self.served.open_adapted(adapter))
        else:
            opening = asyncio.ensure_future(self.served.open_sequence(chain))
        try:
            done, _ = await asyncio.wait({opening}, timeout=ROOM_S)
            if not done:
                self._kept.clear()
            return await opening
        except BaseException:
            opening.cancel()
            (result,) = await asyncio.gather(opening, return_exceptions=True)
            if not isinstance(result, BaseException):
                result.close()
            raise

    async def _in_time(self, step: Awaitable[None], count: int) -> None:
        """Take `count` new tokens; sessions at rest make room if it takes long."""
        after_s = STALL_S + STALL_S_PER_TOKEN * count
        room = asyncio.get_running_loop().call_later(after_s, self._kept.clear)
        try:
            await step
        finally:
            room.cancel()

    def _keep(self, job: Job, session: TokenSequence, tokens: Sequence[int]) -> None:
        held = (*job.prompt_ids, *tokens)[: session.length]
        self._kept.put(Kept(owner=job.owner, tokens=held, session=session, at_s=self._clock()))

    # --- tokens ------------------------------------------------------------------------

    async def _write_all(
        self,
        session: TokenSequence,
        writings: Sequence[Writing],
        sink: Sink,
    ) -> list[Recovery]:
        """All choices at the same time; repairs of the forks' chains come back."""
        forks: list[TokenSequence] = []
        try:
            for _ in writings[1:]:
                forks.append(await session.fork())
            works = [
                asyncio.ensure_future(self._write(one, writing, sink))
                for one, writing in zip((session, *forks), writings, strict=True)
            ]
            try:
                await asyncio.gather(*works)
            finally:
                for work in works:
                    work.cancel()
                await asyncio.gather(*works, return_exceptions=True)
            return [recovery for fork in forks for recovery in fork.recoveries]
        finally:
            for fork in forks:
                fork.close()

    async def _write(
        self,
        session: TokenSequence,
        writing: Writing,
        sink: Sink,
    ) -> None:
        try:
            await self._write_tokens(session, writing, sink)
        except SessionTooLong:
            if not writing.num_tokens:
                raise
            await sink.piece(writing.end("length"))
        finally:
            await session.end()

    async def _write_tokens(self, session: TokenSequence, writing: Writing, sink: Sink) -> None:
        told, at_s = len(session.recoveries), self._clock()
        while True:
            await self._in_time(session.choose(writing), 1)
            if writing.num_tokens > 1:
                now_s = self._clock()
                self._meter.token_s.observe(now_s - at_s)
                at_s = now_s
            piece = writing.write()
            if writing.ending is None:
                # Before the piece is told: servers compute while it is written and sent.
                await session.go_on(writing.tokens[-1])
            if piece is not None:
                fresh = session.recoveries[told:]
                told += len(fresh)
                await sink.piece(replace(piece, recoveries=fresh) if fresh else piece)
            if writing.ending is not None:
                return

    def _done(
        self,
        job: Job,
        session: TokenSequence,
        kept_tokens: int,
        writings: Sequence[Writing],
        recoveries: Sequence[Recovery],
    ) -> Done:
        answer_tokens = sum(len(writing.tokens) for writing in writings)
        self._meter.prompt_tokens.inc(len(job.prompt_ids))
        self._meter.kept_tokens.inc(kept_tokens)
        self._meter.answer_tokens.inc(answer_tokens)
        for recovery in recoveries:
            self._meter.repaired(recovery)
        return Done(
            prompt_tokens=len(job.prompt_ids),
            kept_tokens=kept_tokens,
            answer_tokens=answer_tokens,
            chain=session.chain,
            recoveries=tuple(recoveries),
            numerics=session.numerics,
        )


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens that the model has not.

    Raises:
        ApiError: 400: names one.
    """
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise ApiError(
            400, f"token {strange} is outside the vocabulary of {vocab_size}", param="prompt"
        )
