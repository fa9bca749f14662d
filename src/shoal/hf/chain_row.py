"""One sequence as transformers' code sees it: tokens or tensors in, hidden states out.

The ground truth of a row are its chunks, the inputs in the calls they came in. They are
never changed, because forks share them and a repair may ask for their rows at any time.
A row runs over one chain, or over several in turn where hidden states are wanted at
borders between them. Everything here runs on the client's event loop.
Shapes: S rows, D hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch

from shoal.base.errors import BadInput, SessionClosed, ShoalError
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client
from shoal.client.session import Move, Recovery
from shoal.hf.head import Head
from shoal.model.rows import rows_from_bytes, rows_to_bytes
from shoal.plan.view import Stage
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE
from shoal.wire.tensors import row_bytes

ChunkKind = Literal["ids", "embeddings", "hidden"]
"""What a chunk holds: token ids, embeddings in place of looked-up ones, or hidden states
that enter the first block as they are."""

_NUMERICS = ("exact", "same-class", "crossed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The inputs of one call."""

    kind: ChunkKind
    position: int
    values: torch.Tensor
    """(S,) token ids, or (S, D) embeddings or hidden states; on the CPU, nobody else's."""

    @property
    def count(self) -> int:
        """How many positions."""
        return int(self.values.shape[0])

    def cut(self, length: int) -> Chunk:
        """Without the positions >= `length` of the sequence."""
        return replace(self, values=self.values[: length - self.position])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """What all rows of one model share."""

    client: Client
    head: Head
    encoding: str
    inner_encoding: str | None
    adapter: bytes = b""
    """Name of the LoRA adapter that all rows go through; empty: none."""

    def rows(self, chunk: Chunk, position: int, count: int) -> bytes:
        """Rows [position, position + count) of a chunk, as they enter the first block."""
        start = position - chunk.position
        values = chunk.values[start : start + count]
        if chunk.kind == "ids":
            return self.head.embed(values.tolist(), self.encoding, position)
        if chunk.kind == "embeddings":
            return self.head.embed_given(values, self.encoding, position)
        return rows_to_bytes(values, self.encoding)

    def tensor(self, rows: bytes) -> torch.Tensor:
        """(S, D) rows in the encoding's dtype."""
        count = len(rows) // row_bytes(self.encoding, self.head.hidden_size)
        if not count:
            return torch.zeros(0, self.head.hidden_size)
        return rows_from_bytes(rows, self.encoding, count, self.head.hidden_size)

    def payload(self, chunk: Chunk) -> Callable[[int, int], bytes]:
        """What makes rows of the chunk whenever they are sent."""
        return partial(self.rows, chunk)


class ChainRow:
    """One sequence over the blocks between `borders`. Made by `open_row`."""

    def __init__(
        self,
        chains: Chains,
        borders: tuple[int, ...],
        sessions: Sequence[ChainSession],
        *,
        with_states: bool,
    ) -> None:
        self.borders = borders
        self.with_states = with_states
        self.chunks: tuple[Chunk, ...] = ()
        self._chains = chains
        self._sessions = list(sessions)
        self._is_closed = False

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.chunks[-1].position + self.chunks[-1].count if self.chunks else 0

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Who runs which blocks now."""
        return tuple(stage for session in self._sessions for stage in session.chain)

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The repairs so far."""
        return tuple(one for session in self._sessions for one in session.recoveries)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The planned changes of the chain so far."""
        return tuple(one for session in self._sessions for one in session.moves)

    @property
    def numerics(self) -> str:
        """`exact`, `same-class` or `crossed`: what repairs did to the numbers."""
        return max((session.numerics for session in self._sessions), key=_NUMERICS.index)

    async def step(self, kind: ChunkKind, values: torch.Tensor, keep: int) -> list[torch.Tensor]:
        """Append inputs; the last `keep` rows at each border, the first one included.

        Only the rows behind the last block come back; `with_states`, the rows at all
        borders, all of them. If it fails, the row is as long as before.

        Raises:
            BadInput: values that can't be embedded or that a server refuses.
            SessionTooLong, NoRouteError, PeerError: as `ChainSession.step`.
            SessionClosed: the row was closed.
        """
        self._check_open()
        before = self.length
        chunk = Chunk(kind=kind, position=before, values=values)
        try:
            # Embedded once before it is sent: what can't be embedded must fail here.
            first = self._chains.rows(chunk, before, chunk.count)
            if not self.with_states:
                found = [await self._last_rows(chunk, keep)]
            else:
                found = await self._all_rows(chunk, first)
        except BaseException:
            self._cut_sessions(before)
            raise
        self.chunks = (*self.chunks, chunk)
        return [self._chains.tensor(rows) for rows in found]

    async def _last_rows(self, chunk: Chunk, keep: int) -> bytes:
        (session,) = self._sessions

        rows = self._chains.payload(chunk)
        if keep <= 1:
            return await session.step(rows, chunk.count, want=WANT_LAST if keep else WANT_NONE)
        if keep < chunk.count:
            session.append(rows, chunk.count - keep, want=WANT_NONE)
        return await session.step(rows, min(keep, chunk.count), want=WANT_ALL)

    async def _all_rows(self, chunk: Chunk, first: bytes) -> list[bytes]:
        found = [first]
        for session in self._sessions:
            found.append(await session.step(found[-1], chunk.count, want=WANT_ALL))
        return found

    async def replay(self, chunks: Sequence[Chunk]) -> None:
        """Run saved chunks again, in the calls they came in, without taking rows back."""
        self._check_open()
        for chunk in chunks:
            if self.with_states:
                await self.step(chunk.kind, chunk.values, 0)
                continue
            (session,) = self._sessions
            session.append(self._chains.payload(chunk), chunk.count, want=WANT_NONE)
            self.chunks = (*self.chunks, chunk)
        if not self.with_states:
            await self._sessions[0].rows(0, self.length)

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`.

        Raises:
            BadInput: not a length up to the present one.
            SessionClosed: the row was closed.
        """
        self._check_open()
        if not 0 <= length <= self.length:
            raise BadInput(f"can't truncate {self.length} positions to {length}")
        for session in self._sessions:
            session.truncate(length)
        kept = [chunk for chunk in self.chunks if chunk.position < length]
        self.chunks = tuple(
            chunk if chunk.position + chunk.count <= length else chunk.cut(length) for chunk in kept
        )

    async def fork(self) -> ChainRow:
        """A second row with the same past; nothing is computed again."""
        self._check_open()
        made: list[ChainSession] = []
        try:
            for session in self._sessions:
                made.append(await session.fork())
        except BaseException:
            _close_all(made)
            raise
        child = ChainRow(self._chains, self.borders, made, with_states=self.with_states)
        child.chunks = self.chunks
        return child

    def close(self) -> None:
        """Free it here and at the servers. Idempotent."""
        self._is_closed = True
        _close_all(self._sessions)

    def _cut_sessions(self, length: int) -> None:
        for session in self._sessions:
            try:
                session.truncate(min(length, session.length))
            except ShoalError:
                continue  # it failed for good, and says why when it is used next

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("this session was closed: open a new one")


async def open_row(
    chains: Chains, borders: tuple[int, ...], *, with_states: bool = False
) -> ChainRow:
    """A new row over the blocks between the first and the last border.

    `with_states` there is a chain for each gap between borders, else one for all.

    Raises:
        NoRouteError, PeerError: as `Client.open_session`.
    """
    made: list[ChainSession] = []
    try:
        for start, end in pairwise(borders if with_states else (borders[0], borders[-1])):
            made.append(
                await chains.client.open_session(
                    chains.encoding,
                    Span(start, end),
                    inner_encoding=chains.inner_encoding,
                    adapter=chains.adapter,
                )
            )
    except BaseException:
        _close_all(made)
        raise
    return ChainRow(chains, borders, made, with_states=with_states)


async def together(works: Sequence[Coroutine[Any, Any, ChainRow]]) -> list[ChainRow]:
    """Rows that are made at the same time, all or none."""
    results = await asyncio.gather(*works, return_exceptions=True)
    rows = [one for one in results if isinstance(one, ChainRow)]
    failures = [one for one in results if isinstance(one, BaseException)]
    if failures:
        for row in rows:
            row.close()
        raise failures[0]
    return rows


def _close_all(sessions: Sequence[ChainSession]) -> None:
    for session in sessions:
        session.close()
