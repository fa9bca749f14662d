"""One sequence of a thin client: its tokens are here, everything else is at a head server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from shoal.base.errors import (
    BadInput,
    ConfigError,
    ModelError,
    NoRouteError,
    PeerMisbehaved,
    SessionClosed,
    SessionLost,
    SessionTooLong,
    ShoalError,
)
from shoal.base.head import Choosing, Chosen
from shoal.base.ids import PeerId, SessionId
from shoal.client.head_stream import Asked, HeadStream
from shoal.client.head_words import (
    NUMERICS,
    Stretch,
    chosen_from_wire,
    pack_ids,
    parts_of,
    read_moves,
    read_repairs,
    read_stages,
    to_options,
)
from shoal.client.session import Move, Recovery
from shoal.client.waiting import Waiting
from shoal.plan.view import Stage
from shoal.wire.head import PARTS_MAX, AskTokens, CallShape, EndTokens, ToldChain

if TYPE_CHECKING:
    from shoal.client.thin import ThinClient

LOSSES_MAX: Final = 3
"""A head server that loses a session more often than this without a token is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is wanted of a session's next answer."""

    count: int
    """Tokens at most; 0: only run what was appended."""
    choosing: Choosing = field(default_factory=Choosing)
    answer_start: int = 0
    """The first position that belongs to the answer, for penalties."""
    end_ids: Collection[int] = ()
    allowed: bytes | None = None
    """Bits of the tokens that may be chosen, of one token."""


@dataclass(slots=True)
class _Place:
    """Where the session lives now."""

    stream: HeadStream
    generation: int
    number: int
    held: int = 0
    """Positions that the head server has for sure."""
    parent: int | None = None
    """Whose copy it begins as, until the first question."""

    @property
    def is_there(self) -> bool:
        return self.stream.generation == self.generation and self.stream.is_open


@dataclass(slots=True)
class _Trouble:
    """Since the last answer."""

    since_s: float
    lost: PeerId | None
    tried: set[PeerId]
    losses: int = 0


class ThinSession:
    """A sequence of tokens. Not for two tasks at once.

    A failure of head servers, as of any others, is repaired below `tokens`; it just takes longer.
    """

    def __init__(self, client: ThinClient, identifier: bytes, adapter: bytes = b"") -> None:
        self.id = SessionId(identifier)
        self.adapter = adapter
        """Name of the adapter that its rows go through; empty: none."""
        self.chain: tuple[Stage, ...] = ()
        """Who runs which blocks now, as the head server says."""
        self.numerics = NUMERICS[0]
        """`exact`, `same-class` or `crossed`: what repairs did to the numbers."""
        self.recoveries: tuple[Recovery, ...] = ()
        self.moves: tuple[Move, ...] = ()
        self._client = client
        self._ids: list[int] = []
        self._stretches: list[Stretch] = []
        """The calls in which the tokens are run; their sizes sum up to the length."""
        self._has_row = False
        """Whether the head server can choose a token without running any."""
        self._place: _Place | None = None
        self._head_class = ""
        self._classes: dict[int, str] = {}
        """Numerics class of each block, when last told."""
        self._worth = NUMERICS[0]
        """What changes of head servers did to the numbers."""
        self._trouble: _Trouble | None = None
        self._is_closed = False
        self._clock = asyncio.get_running_loop().time

    @property
    def length(self) -> int:
        """Positions so far; the last token of an answer is none until it is appended."""
        return len(self._ids)

    @property
    def head(self) -> PeerId | None:
        """The head server that has it now."""
        return None if self._place is None else self._place.stream.peer

    @property
    def token_ids(self) -> tuple[int, ...]:
        """One for each position."""
        return tuple(self._ids)

    def append(self, ids: Sequence[int], *, is_one_by_one: bool = False) -> None:
        """Tokens after the last one, run with the next question: in one call, or in one each.

        Raises:
            BadInput: a token outside the vocabulary.
            SessionClosed: it was closed.
        """
        self._check_open()
        size = self._client.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise BadInput(f"tokens outside the vocabulary of {size}")
        if ids:
            self._ids.extend(ids)
            one_call = Stretch(len(ids), len(ids))
            self._stretches += [Stretch(1, 1)] * len(ids) if is_one_by_one else [one_call]
            self._has_row = False

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`.

        Raises:
            BadInput: longer than the session.
            SessionClosed: it was closed.
        """
        self._check_open()
        if not 0 <= length <= len(self._ids):
            raise BadInput(f"can't cut {len(self._ids)} positions to {length}")
        excess = len(self._ids) - length
        self._has_row = self._has_row and not excess
        del self._ids[length:]
        while excess:
            last = self._stretches.pop()
            if last.size > excess:
                self._stretches.append(Stretch(last.size - excess, last.whole))
            excess = max(0, excess - last.size)
        if self._place is not None:
            self._place.held = min(self._place.held, length)

    async def fork(self, length: int | None = None) -> ThinSession:
        """A second session with our first `length` positions (default: all)."""
        self._check_open()
        length = len(self._ids) if length is None else length
        child = ThinSession(self._client, self._client.rng.randbytes(16), self.adapter)
        child._ids, child._stretches = list(self._ids), list(self._stretches)
        child._has_row = self._has_row
        child.truncate(length)
        child.chain, child.numerics, child._worth = self.chain, self.numerics, self._worth
        child._head_class, child._classes = self._head_class, dict(self._classes)
        place = self._place
        if place is not None and place.is_there and place.parent is None and place.held >= length:
            child._place = _Place(
                stream=place.stream, generation=place.generation,
                number=place.stream.new_number(), held=length, parent=place.number,
            )  # fmt: skip
        self._client.adopt(child)
        return child

    def close(self) -> None:
        """Free it here and there. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._leave()
        self._client.forget(self)

    def _leave(self) -> None:
        """Give up the session at its head server."""
        place, self._place = self._place, None
        if place is not None and place.is_there:
            place.stream.post(EndTokens(place.number))

    async def __aenter__(self) -> ThinSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # --- answers -----------------------------------------------------------------------

    async def read(self) -> None:
        """Run what was appended.

        Raises:
            ShoalError: as `tokens`.
        """
        async with aclosing(self.tokens(Wish(count=0))) as tokens:
            async for _ in tokens:
                pass

    async def tokens(self, wish: Wish) -> AsyncGenerator[Chosen, None]:
        """New tokens after those that were appended, as they come.

        Each one is appended when the next one comes, or by whoever goes on. Close it (or use
        `aclosing`) to stop the rest.

        Raises:
            BadInput, ConfigError: options or tokens that can't be.
            SessionTooLong: a server's cache or the model's context ends here.
            NoRouteError, PeerError: no head server could answer within the patience.
            SessionClosed: the session was closed.
        """
        left, last = wish.count, None
        while True:
            self._check_open()
            if left and self._ids and not self._has_row and self._is_all_held():
                last_id = self._ids[-1]  # nothing new, and its row is gone: run it again
                self.truncate(len(self._ids) - 1)
                self.append([last_id])
            place = await self._find_place()
            try:
                async with place.stream.ask(*self._question(place, wish, left)) as asked:
                    place.held, place.parent = len(self._ids), None
                    self._has_row = False
                    async for chosen, is_end in self._answers(asked):
                        if last is not None:
                            self.append([last])
                            place.held = len(self._ids)
                        self._recovered(place)
                        if chosen is None:
                            self._has_row = True
                            return
                        left, last = left - 1, chosen.id
                        self._has_row = is_end or not left
                        yield chosen
                        if self._has_row:
                            return
            except ShoalError as error:
                if last is not None:
                    self.append([last])
                    last = None
                await self._troubled(error)

    async def _answers(self, asked: Asked) -> AsyncIterator[tuple[Chosen | None, bool]]:
        """Tokens, and whether it is the last; a token None: there was only to run what is new."""
        while True:
            given = await asked.next()
            if given.chain is not None:
                self._told(given.chain)
            for index, token in enumerate(given.tokens):
                chosen = chosen_from_wire(token, self._client.config.vocab_size)
                yield chosen, given.is_last and index + 1 == len(given.tokens)
            if given.is_last and not given.tokens:
                yield None, True

    def _question(
        self, place: _Place, wish: Wish, count: int
    ) -> tuple[Callable[[int], AskTokens], bytes]:
        config, start = self._client.config, place.held
        parts = parts_of(self._stretches_from(start))
        if len(parts) > PARTS_MAX:  # of a very long conversation the beginning is run in one call
            few, size = parts[1 - PARTS_MAX :], len(self._ids) - start
            parts = [CallShape(size - sum(one.size * one.times for one in few)), *few]
        payload = pack_ids(self._ids[start:]) + (wish.allowed or b"")

        def make(call: int) -> AskTokens:
            return AskTokens(
                call=call,
                session=place.number,
                start=start,
                num_ids=len(self._ids) - start,
                parts=parts,
                count=count,
                answer_start=min(wish.answer_start, len(self._ids)),
                options=to_options(wish.choosing),
                end_ids=sorted(wish.end_ids),
                encoding=config.encoding,
                is_compressed=config.is_compressed,
                parent=place.parent,
                adapter=self.adapter,
            )

        return make, payload

    def _is_all_held(self) -> bool:
        """Whether there is nothing new to send to where the session lives."""
        place = self._place
        return place is not None and place.is_there and place.held == len(self._ids)

    def _stretches_from(self, start: int) -> list[Stretch]:
        """The calls behind position `start`, at which one begins."""
        found: list[Stretch] = []
        end = len(self._ids)
        for one in reversed(self._stretches):
            if end <= start:
                break
            found.append(one)
            end -= one.size
        return found[::-1]

    # --- head servers ------------------------------------------------------------------

    async def _find_place(self) -> _Place:
        """Where to ask: where the session is, or else at the best head server.

        Raises:
            NoRouteError: none can be had within the patience.
        """
        if self._place is not None and self._place.is_there:
            return self._place
        if self._place is not None:  # its stream broke while nobody asked
            self._begin_trouble()
        trouble = self._trouble
        while True:
            tried = set() if trouble is None else trouble.tried
            stream = await self._client.stream_for(self._head_class, tried)
            if stream is not None:
                break
            if trouble is None:
                trouble = self._begin_trouble()
            await self._wait(NoRouteError("no head server answers"))
        self._place = _Place(
            stream=stream, generation=stream.generation, number=stream.new_number()
        )
        return self._place

    def _begin_trouble(self) -> _Trouble:
        if self._trouble is None:
            self._trouble = _Trouble(self._clock(), self.head, set())
        self._place = None
        return self._trouble

    async def _troubled(self, error: ShoalError) -> None:
        """Go on elsewhere, or raise what can't be mended."""
        if isinstance(error, BadInput | ConfigError | SessionTooLong | SessionClosed | ModelError):
            self._leave()
            raise error
        peer = self.head
        is_lost = isinstance(error, SessionLost)
        trouble = self._trouble or _Trouble(self._clock(), None if is_lost else peer, set())
        self._trouble = trouble
        self._leave()
        if is_lost and trouble.losses < LOSSES_MAX:  # it was at rest too long, say
            trouble.losses += 1
            return
        if peer is not None:
            self._client.failed(peer, error)
            trouble.tried.add(peer)
        self._check_patience(error)

    async def _wait(self, error: ShoalError) -> None:
        """All head servers were tried: wait a little, and try them again."""
        self._check_patience(error)
        trouble = self._begin_trouble()
        if self._client.config.on_waiting is not None:
            told = Waiting(
                missing=(), lost=(), reason="no head server answers", since_s=trouble.since_s,
                deadline_s=trouble.since_s + self._client.config.patience_s,
            )  # fmt: skip
            self._client.config.on_waiting(self.id, told)
        await self._client.wait_for_news()
        trouble.tried.clear()

    def _check_patience(self, error: ShoalError) -> None:
        trouble = self._trouble
        if trouble is None or self._clock() - trouble.since_s < self._client.config.patience_s:
            return
        self._trouble = None
        self._tell_over()
        raise error

    def _recovered(self, place: _Place) -> None:
        """A token came, or all was run: what was lost is behind us."""
        peer = place.stream.peer
        self._head_class = self._client.class_of(peer) or self._head_class
        trouble, self._trouble = self._trouble, None
        if trouble is None:
            return
        self._tell_over()
        if trouble.lost is None:
            return
        self.recoveries += (
            Recovery(
                position=len(self._ids),
                lost=(trouble.lost,),
                replacement=(peer,),
                replayed_tokens=len(self._ids),
                pause_s=self._clock() - trouble.since_s,
            ),
        )

    def _tell_over(self) -> None:
        if self._client.config.on_waiting is not None:
            self._client.config.on_waiting(self.id, None)

    def _told(self, told: ToldChain) -> None:
        """What the head server says of its chain."""
        stages = read_stages(told)
        if told.adapter != self.adapter:
            raise PeerMisbehaved("leaves the adapter out that it was asked for: is it older?")
        servers = {server.peer: server for server in self._client.view().servers}
        classes: dict[int, str] = {}
        is_exact = True
        for stage in stages:
            server = servers.get(stage.peer)
            if server is not None:
                is_exact = is_exact and server.is_exact
                for block in range(stage.span.start, stage.span.end):
                    classes[block] = server.numerics
        if self._trouble is not None and self._classes:
            place_class = self._client.class_of(self.head) if self.head is not None else ""
            is_crossed = place_class != self._head_class or any(
                classes.get(block, found) != found for block, found in self._classes.items()
            )
            now = "crossed" if is_crossed else "exact" if is_exact else "same-class"
            self._worth = max(self._worth, self.numerics, now, key=NUMERICS.index)
        self._classes = classes
        self.chain = stages
        self.numerics = max(self._worth, told.numerics, key=NUMERICS.index)
        self.recoveries += tuple(read_repairs(told))
        self.moves += tuple(read_moves(told))

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("the session was closed")
